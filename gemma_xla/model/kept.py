"""Activations by name: what a layer's backward pass finds instead of computing it again.

With rematerialisation, a backward pass runs each layer once more. What was noted of a layer takes the place of what it
would compute: where operations are recorded before they run, those whose results nobody uses never run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

Tensors = tuple[torch.Tensor, ...]


class Kept:
    """Nothing is kept: everything is computed where it is asked for."""

    def __init__(self, turn: torch.Tensor | None = None) -> None:
        """
        Args:
            turn: a random number from 0 to 1 for a pass of a loop, each of which draws the same numbers.
        """
        self._turn = turn

    def uniform(self, x: torch.Tensor) -> torch.Tensor:
        """Random numbers from 0 to 1, float32, as many as ``x`` has elements."""
        drawn = torch.rand_like(x, dtype=torch.float32)
        if self._turn is None:
            return drawn
        # On a circle, so that they stay evenly spread.
        drawn = drawn + self._turn
        return drawn - torch.floor(drawn)

    def compute(self, name: str, function: Callable[[], Tensors]) -> Tensors:
        """Return what ``function`` does, or what it did; inside an autograd function."""
        return function()

    def replace(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return ``tensor``, or in its place what was noted of it; the gradient flows to ``tensor``."""
        return tensor

    def dropout(self, x: torch.Tensor, p: float) -> torch.Tensor:
        """Drop out a part of ``x``, the same part when it is computed again."""
        return F.dropout(x, p)


class Noting(Kept):
    """Notes what ``names`` say, and every random choice, in `values`."""

    def __init__(self, names: frozenset[str], turn: torch.Tensor | None = None) -> None:
        super().__init__(turn)
        self.names = names
        self.values: dict[str, list[torch.Tensor]] = {}

    def compute(self, name, function):
        values = function()
        if name in self.names:
            self.values[name] = list(values)
        return values

    def replace(self, name, tensor):
        if name in self.names:
            self.values[name] = [tensor]
        return tensor

    def dropout(self, x, p):
        stays = self.uniform(x) >= p
        self.values[f"dropout {len(self.values)}"] = [stays]
        return x * stays / (1 - p)


class Replaying(Kept):
    """Gives back what was noted, in the same order."""

    def __init__(self, values: dict[str, list[torch.Tensor]], turn: torch.Tensor | None = None) -> None:
        super().__init__(turn)
        self.values = values
        self._choices = iter([tensor for name, (tensor, *_) in values.items() if name.startswith("dropout ")])

    def compute(self, name, function):
        return tuple(self.values[name]) if name in self.values else function()

    def replace(self, name, tensor):
        return _Instead.apply(tensor, self.values[name][0]) if name in self.values else tensor

    def dropout(self, x, p):
        return x * next(self._choices) / (1 - p)


class _Instead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, value):
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


_active = [Kept()]


def kept() -> Kept:
    """The one in use."""
    return _active[-1]


@contextmanager
def using(kept: Kept) -> Iterator[None]:
    """Use ``kept`` for a while."""
    _active.append(kept)
    try:
        yield
    finally:
        _active.pop()
