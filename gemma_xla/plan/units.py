"""Figures for people. Memory is in GiB: that is what chips are sold and compilers reckon by."""

from __future__ import annotations

GIB = 2**30
_SCALES = ((1e12, "trillion"), (1e9, "billion"), (1e6, "million"))


def gib(num_bytes: float) -> str:
    """Bytes in GiB: two decimals, or two digits where that would say 0.00."""
    value = num_bytes / GIB
    return f"{value:.2f}" if abs(value) >= 0.005 or not value else f"{value:.2g}"


def size(num_bytes: float) -> str:
    """Bytes in the unit that suits them."""
    for scale, unit in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(num_bytes) >= 0.1 * scale:
            return f"{num_bytes / scale:.2f} {unit}"
    return f"{num_bytes:.0f} B"


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    for scale, unit in ((1, "s"), (1e-3, "ms")):
        if seconds >= 0.1 * scale:
            return f"{seconds / scale:.4g} {unit}"
    return f"{seconds * 1e6:.4g} us"


def count(number: float, short: bool = False) -> str:
    """A large number in words (19.7 million), or with the word's first letter (19.7M)."""
    for scale, word in _SCALES:
        if number >= scale:
            return f"{number / scale:.4g}{word[0].upper() if short else ' ' + word}"
    return f"{number:,.0f}"
