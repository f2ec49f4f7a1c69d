"""Text generation: prefill, then one token a step, with shapes that do not change."""

from gemma_xla.infer.cache import KVCache
from gemma_xla.infer.generate import generate, generate_steps

__all__ = ["KVCache", "generate", "generate_steps"]
