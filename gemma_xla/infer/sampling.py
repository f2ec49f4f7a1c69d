"""The next token from its logits.

Shape letters: B batch rows, V vocab_size (or the part of it that is left).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gemma_xla.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the most likely token; above, logits are divided by it.
        top_k: how many of the most likely tokens may be drawn; None: all.
        top_p: draw from the fewest most likely tokens whose probabilities reach this sum (nucleus sampling,
            arXiv:1904.09751); None: from all.

    Raises:
        UserError: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}; it must be 0 (most likely token) or greater")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}; it must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must be above 0 and at most 1")


def next_token(logits_BV: torch.Tensor, uniform_B: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Return the chosen token ids, ``[B]``.

    Args:
        uniform_B: a number in [0, 1) per row, all the randomness there is: the same numbers choose the same tokens on
            every kind of device.
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    # Stable, so that equal logits keep the order that argmax goes by.
    logits_BV, ids_BV = logits_BV.float().sort(dim=-1, descending=True, stable=True)
    logits_BV = logits_BV[:, : sampling.top_k]
    probs_BV = torch.softmax(logits_BV / sampling.temperature, dim=-1)
    cumulative_BV = probs_BV.cumsum(-1)
    if sampling.top_p is not None:
        probs_BV = torch.where(cumulative_BV - probs_BV < sampling.top_p, probs_BV, 0.0)
        cumulative_BV = probs_BV.cumsum(-1)
    # Inverse of the distribution function: the first token whose cumulative probability exceeds the drawn share.
    exceeds_BV = cumulative_BV > uniform_B[:, None] * cumulative_BV[:, -1:]
    return ids_BV.gather(-1, exceeds_BV.int().argmax(-1, keepdim=True))[:, 0]
