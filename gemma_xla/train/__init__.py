"""The training loop and everything it is made of."""

from gemma_xla.train.finish import finish
from gemma_xla.train.run import Run
from gemma_xla.train.trainer import Trainer

__all__ = ["Run", "Trainer", "finish"]
