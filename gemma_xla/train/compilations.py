"""Steady state compiles nothing; when it does, say why."""

from __future__ import annotations

import warnings

from gemma_xla.backend import Backend
from gemma_xla.train.step import Batch

Shapes = dict[str, tuple[int, ...]]


class CompilationWatch:
    """Counts compilations and warns of those that a step should not have needed."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._start = self._seen = backend.compilations()
        self._shapes: Shapes | None = None

    @property
    def count(self) -> int:
        """Graphs compiled since the watch began."""
        return self._backend.compilations() - self._start

    def expect(self) -> None:
        """Whatever has been compiled by now was due: the first evaluation, say."""
        self._seen = self._backend.compilations()

    def after_step(self, step: int, micro_batches: list[Batch]) -> None:
        """Warn if this step compiled although one before it had already been compiled."""
        shapes = {f"micro-batch {i}: {k}": tuple(v.shape) for i, b in enumerate(micro_batches) for k, v in b.items()}
        now, before = self._backend.compilations(), self._seen
        if now > before and self._shapes is not None:
            warnings.warn(f"step {step} compiled {now - before} graph(s): {self._cause(shapes)}", stacklevel=2)
        self._seen, self._shapes = now, shapes

    def _cause(self, shapes: Shapes) -> str:
        changed = [
            f"{name} is now {shapes.get(name, 'absent')}, it was {self._shapes.get(name, 'absent')}"
            for name in sorted(shapes.keys() | self._shapes.keys())
            if shapes.get(name) != self._shapes.get(name)
        ]
        if changed:
            return "the inputs changed: " + "; ".join(changed)
        return (
            "the inputs have the shapes they had, so a value that is part of the graph changed; "
            "PT_XLA_DEBUG_LEVEL=2 shows which line asked for it"
        )
