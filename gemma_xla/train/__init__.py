"""The training loop and everything it is made of."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemma_xla.train.finishing import finish
    from gemma_xla.train.run import Run
    from gemma_xla.train.trainer import Trainer

__all__ = ["Run", "Trainer", "finish"]


_HOMES = {"Run": "run", "Trainer": "trainer", "finish": "finishing"}


def __getattr__(name: str) -> Any:
    # On demand: a run loads accelerate and datasets, which take seconds that planning one does without.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
