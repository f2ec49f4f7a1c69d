"""Random numbers that depend on a key alone: equal on all machines, at any time."""

from __future__ import annotations

import hashlib

import numpy as np


def uniform(*key: int | str) -> float:
    """Return a number in [0, 1) that depends on ``key`` alone."""
    # 53 bits: what a float holds, so that the result stays below 1.
    return (_digest(key) >> 11) / 2**53


def generator(*key: int | str) -> np.random.Generator:
    """Return a random generator whose numbers depend on ``key`` alone."""
    return np.random.default_rng(_digest(key))


def _digest(key: tuple[int | str, ...]) -> int:
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big")
