"""Gemma, a plain `nn.Module`: it knows nothing of devices, meshes or precision; `gemma_xla.sharding` and
`gemma_xla.train` apply those from outside.

Shape letters: B batch rows, T positions, D hidden_size, V vocab_size.
"""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import nn

from gemma_xla.model.attention import Mask
from gemma_xla.model.config import GemmaConfig
from gemma_xla.model.layers import Cache, GemmaDecoderLayer, RMSNorm, rope_table
from gemma_xla.model.loss import Layout, chunked_cross_entropy, loss_and_hits


class GemmaModel(nn.Module):
    """The decoder without its output layer: token ids ``[B, T]`` to hidden states ``[B, T, D]``."""

    def __init__(self, config: GemmaConfig, impl: str) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(GemmaDecoderLayer(config, i, impl) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        input_ids_BT: torch.Tensor,
        position_ids_BT: torch.Tensor,
        mask: Mask,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        h_BTD = self.embed_tokens(input_ids_BT)
        # Rounded to the compute dtype before the product, as the reference does.
        h_BTD = h_BTD * torch.full((), self.config.hidden_size**0.5, dtype=h_BTD.dtype, device=h_BTD.device)
        cos, sin = self.rope(position_ids_BT)
        return self.norm(self.run_layers(h_BTD, cos, sin, mask, cache))

    def rope(self, position_ids_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The rotary embeddings' tables. A method of its own, as the next one is."""
        return rope_table(position_ids_BT, self.config.head_dim, self.config.rope_theta)

    def run_layers(self, h_BTD, cos, sin, mask: Mask, cache: Cache | None) -> torch.Tensor:
        """Apply the layers in turn. A method of its own so that a compiler's loop can take its place."""
        for layer in self.layers:
            h_BTD = layer(h_BTD, cos, sin, mask, cache)
        return h_BTD


class Gemma(nn.Module):
    """Gemma (arXiv:2403.08295) with its output layer, which shares the input embedding's weights.

    Parameter names are those of ``transformers.GemmaForCausalLM``. The output layer has no parameter of its own, so
    nothing can come untied when the model moves.
    """

    def __init__(self, config: GemmaConfig, attention: str = "sdpa") -> None:
        """
        Args:
            config: the architecture.
            attention: a key of `gemma_xla.model.attention.IMPLEMENTATIONS`.
        """
        super().__init__()
        self.config = config
        self.model = GemmaModel(config, attention)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
        *,
        loss_chunk: int = 512,
        loss_layout: Layout | None = None,
        count_hits: bool = False,
        logits_at: torch.Tensor | None = None,
        mask: Mask | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """Return logits ``[B, T, V]`` or, when labels are given, the summed loss.

        Args:
            input_ids: token ids, ``[B, T]``.
            position_ids: each token's place in its document, ``[B, T]``; None: 0 to T - 1.
            segment_ids: the document each token belongs to, ``[B, T]``, 0 for padding; None: each row is one document.
                An ``attention_mask`` of ones and zeros will do.
            shift_labels: the token that follows each position, ``[B, T]``, -100 where none is to be learnt. The result
                is then the sum of the cross entropy over all others, a float32 scalar.
            loss_chunk: positions per row whose logits exist at one time (with labels only).
            loss_layout: where the loss is computed; None: on one device.
            count_hits: with labels: return also how many of them are the likeliest token, ``[2]`` in all.
            logits_at: one position of each row, ``[B, T]`` with a single one among zeros; only its logits are
                returned, ``[B, V]``.
            mask: for inference: overrides ``segment_ids``.
            cache: for inference: earlier keys and values.
        """
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        h_BTD = self.model(input_ids, position_ids, mask or Mask(segment_ids), cache)
        weight_VD = self.model.embed_tokens.weight
        if shift_labels is not None:
            if count_hits:
                return loss_and_hits(h_BTD, weight_VD, shift_labels, loss_chunk)
            return chunked_cross_entropy(h_BTD, weight_VD, shift_labels, loss_chunk, loss_layout)
        if logits_at is not None:
            h_BTD = (h_BTD * logits_at[..., None]).sum(1).to(h_BTD.dtype)
        return F.linear(h_BTD, weight_VD)


@torch.no_grad()
def init_parameter(name: str, parameter: torch.Tensor, config: GemmaConfig, seed: int) -> None:
    """Fill one parameter with its starting value: zeros for norms (a gain of one), else a normal distribution.

    The values depend on ``seed`` and ``name`` alone, so a model may be filled in any order and on any number of hosts.
    """
    if name.endswith("norm.weight"):
        parameter.zero_()
        return
    generator = torch.Generator(parameter.device).manual_seed(seed_of(seed, name))
    parameter.normal_(0.0, config.initializer_range, generator=generator)


def seed_of(seed: int, name: str) -> int:
    """A 63-bit seed for one name (`hash` differs from process to process)."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1
