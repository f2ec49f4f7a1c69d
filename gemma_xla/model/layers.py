"""The parts of a Gemma decoder layer, with the parameter names of ``transformers``.

Shape letters: B batch rows, T positions, D hidden_size, N query heads, K key/value heads, H head_dim.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from gemma_xla.model.attention import Mask, attend
from gemma_xla.model.config import GemmaConfig


class Cache(Protocol):
    """Keys and values of earlier positions, kept by the inference engine."""

    def update(self, layer_idx: int, k_BTKH: torch.Tensor, v_BTKH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new positions; return all keys and values, ``[B, S, K, H]`` each."""


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32 with gain ``1 + weight`` (arXiv:1910.07467); cast back after the product."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_f32 = x.float()
        x_f32 = x_f32 * torch.rsqrt(x_f32.pow(2).mean(-1, keepdim=True) + self.eps)
        return (x_f32 * (1.0 + self.weight.float())).to(x.dtype)


def rope_table(position_ids_BT: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of rotary embeddings (arXiv:2104.09864), float32, ``[B, T, 1, H/2]`` each."""
    exponent = torch.arange(0, head_dim, 2, device=position_ids_BT.device, dtype=torch.float32) / head_dim
    angle = position_ids_BT.float()[..., None, None] * (1.0 / theta**exponent)
    return angle.cos(), angle.sin()


def apply_rope(x_BTNH: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each pair (first half, second half) by its position's angle, in float32."""
    if x_BTNH.device.type == "xla" and x_BTNH.dtype == torch.bfloat16:
        return _Turn.apply(x_BTNH, cos, sin)
    a, b = x_BTNH.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_BTNH.dtype)


class _Turn(torch.autograd.Function):
    """`apply_rope` with a product instead of halves cut and joined, each of which a TPU makes a pass of its own."""

    @staticmethod
    def forward(ctx, x_BTNH, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turned(x_BTNH, cos, sin)

    @staticmethod
    def backward(ctx, grad_BTNH):
        cos, sin = ctx.saved_tensors
        return _turned(grad_BTNH, cos, -sin), None, None


def _turned(x_BTNH: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x_BTNH.shape[-1] // 2
    place_H = torch.arange(2 * half, dtype=torch.int32, device=x_BTNH.device)
    distance_HH = place_H - place_H[:, None]
    # Makes (-second, first) of (first, second), in any precision exactly.
    quarter_HH = (distance_HH == half).to(x_BTNH.dtype) - (distance_HH == -half).to(x_BTNH.dtype)
    cos, sin = (torch.cat((table, table), dim=-1) for table in (cos, sin))
    return (x_BTNH.float() * cos + (x_BTNH @ quarter_HH).float() * sin).to(x_BTNH.dtype)


class GemmaAttention(nn.Module):
    """Self-attention over one layer's hidden states ``[B, T, D]``."""

    def __init__(self, config: GemmaConfig, layer_idx: int, impl: str) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.impl = impl
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        self.window = config.window(layer_idx)
        D, H = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(D, config.num_attention_heads * H, bias=False)
        self.k_proj = nn.Linear(D, config.num_key_value_heads * H, bias=False)
        self.v_proj = nn.Linear(D, config.num_key_value_heads * H, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * H, D, bias=False)

    def forward(self, x_BTD, cos, sin, mask: Mask, cache: Cache | None = None) -> torch.Tensor:
        q_BTNH, k_BTKH, v_BTKH = (
            proj(x_BTD).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_BTNH, k_BTKH, v_BTKH = self.turned(q_BTNH, k_BTKH, v_BTKH, cos, sin)
        if cache is not None:
            k_BTKH, v_BTKH = cache.update(self.layer_idx, k_BTKH, v_BTKH)
        out_BTNH = attend(q_BTNH, k_BTKH, v_BTKH, mask, window=self.window, scale=self.scale, impl=self.impl)
        return self.o_proj(out_BTNH.flatten(-2))

    def turned(self, q_BTNH, k_BTKH, v_BTKH, cos, sin) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries and keys turned, and values. A method of its own so that a device's kernel can take its place."""
        return apply_rope(q_BTNH, cos, sin), apply_rope(k_BTKH, cos, sin), v_BTKH


class GemmaMLP(nn.Module):
    """Gated feed-forward layer: ``down(gelu(gate(x)) * up(x))`` with the tanh form of gelu (arXiv:2002.05202)."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        D, F_ = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, F_, bias=False)
        self.up_proj = nn.Linear(D, F_, bias=False)
        self.down_proj = nn.Linear(F_, D, bias=False)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.gated(self.gate_proj(x_BTD), self.up_proj(x_BTD)))

    def gated(self, gate_BTF: torch.Tensor, up_BTF: torch.Tensor) -> torch.Tensor:
        """What the last product takes. A method of its own so that a device's own gradient can take its place."""
        return F.gelu(gate_BTF, approximate="tanh") * up_BTF


class GemmaDecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream ``[B, T, D]``."""

    def __init__(self, config: GemmaConfig, layer_idx: int, impl: str) -> None:
        super().__init__()
        self.self_attn = GemmaAttention(config, layer_idx, impl)
        self.mlp = GemmaMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, h_BTD, cos, sin, mask: Mask, cache: Cache | None = None) -> torch.Tensor:
        h_BTD = h_BTD + self.self_attn(self.input_layernorm(h_BTD), cos, sin, mask, cache)
        return h_BTD + self.mlp(self.post_attention_layernorm(h_BTD))
