"""Pretrain and fine-tune Gemma with PyTorch/XLA."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemma_xla.flops import FlopCounter
    from gemma_xla.model.config import GemmaConfig
    from gemma_xla.model.gemma import Gemma

__all__ = ["FlopCounter", "Gemma", "GemmaConfig"]

_HOMES = {"FlopCounter": "flops", "Gemma": "model.gemma", "GemmaConfig": "model.config"}


def __getattr__(name: str) -> Any:
    # On demand: Gemma loads PyTorch, which takes seconds that much of the command line can do without.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
