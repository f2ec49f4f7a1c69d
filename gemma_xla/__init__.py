"""Pretrain Gemma with PyTorch/XLA."""

from gemma_xla.flops import FlopCounter
from gemma_xla.model.config import GemmaConfig
from gemma_xla.model.gemma import Gemma

__all__ = ["FlopCounter", "Gemma", "GemmaConfig"]
