"""Keys and values of earlier positions, in buffers of a fixed size.

Shape letters: B batch rows, T new positions, S all positions, K key/value heads, H head_dim.
"""

from __future__ import annotations

import torch


class KVCache:
    """The keys and values of ``length`` positions per row. A compiler sees the same shapes at every step.

    Set `index_T` to the places of the next tokens before each forward pass. It is a tensor, not a number, so that its
    value does not become part of a compiled program.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.index_T: torch.Tensor | None = None
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(self, layer_idx: int, k_BTKH: torch.Tensor, v_BTKH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new positions at `index_T`; return all keys and values, ``[B, S, K, H]`` each."""
        if layer_idx not in self._layers:
            self._layers[layer_idx] = (self._buffer(k_BTKH), self._buffer(v_BTKH))
        k_BSKH, v_BSKH = self._layers[layer_idx]
        return k_BSKH.index_copy_(1, self.index_T, k_BTKH), v_BSKH.index_copy_(1, self.index_T, v_BTKH)

    def _buffer(self, x_BTKH: torch.Tensor) -> torch.Tensor:
        # Made from the first keys themselves: the same device and compute dtype, whatever they are.
        B, _, K, H = x_BTKH.shape
        return x_BTKH.new_zeros(B, self.length, K, H)
