"""Splash attention: JAX's flash attention for TPUs (arXiv:2205.14135, a Pallas kernel), over a mesh of devices;
gradients are by a kernel of our own where the chip has room for it (`gemma_xla.xla.flash_backward`).

Scores never leave the chip's fast memory: what a backward pass needs beside its inputs is the output and, for each
query, the logarithm of the softmax's sum. Blocks that no query may see are left out.

Shape letters: B batch rows, N query heads, K key/value heads, T positions, H head_dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec

from gemma_xla.sharding import BATCH, MeshShape
from gemma_xla.xla.flash_backward import fits, flash_backward
from gemma_xla.xla.tpu import largest_block, over_mesh

# Positions in a block of queries, in one of keys, and in the part of it that is computed at a time.
_BLOCKS = (1024, 1024, 512)


@dataclass(frozen=True)
class Attention:
    """Causal attention of one shape.

    Attributes:
        kv_heads: of the whole model; each device has its part of them.
        positions: T, a multiple of 128.
        window: positions a query sees, itself included; None: all before it.
        mesh: the devices; batch rows are split over data and fsdp, heads over tensor.
        segmented: whether there are segment ids.
        groups: of heads whose gradients are taken apart from each other, where they can be shared out like that: the
            kernel by itself lets nothing run beside anything else in the backward pass, which leaves a chip's second
            core idle.
        interpret: run the kernel as plain operations, on any device; for tests.
    """

    kv_heads: int
    positions: int
    window: int | None
    mesh: MeshShape
    segmented: bool
    groups: int = 1
    interpret: bool = False

    def forward(self) -> Callable[..., tuple[jax.Array, jax.Array]]:
        """Return the function that maps q ``[B, N, T, H]``, k and v ``[B, K, T, H]`` and, if segmented, segment ids
        ``[B, T]`` to the output ``[B, N, T, H]`` and the log-sum-exp ``[B, N, T]``, float32. Scores are not scaled."""

        def one_row(q, k, v, *segments):
            made = self._kernel(q.shape[0])
            out, (lse,) = kernel._splash_attention_forward(
                made.fwd_mask_info,
                q,
                *(self._heads_of(x) for x in (k, v)),
                _segment_ids(segments),
                None,
                save_residuals=True,
                **self._options(made),
            )
            return out, lse

        heads, keys, rows = self._specs()
        return self._over_mesh(one_row, (heads, keys, keys), (heads, rows))

    def backward(self) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]]:
        """Return the function that maps q, k, v, the output, the log-sum-exp, the output's gradient and, if segmented,
        segment ids to the gradients of q, k and v."""

        def one_row(q, k, v, out, lse, grad, *segments):
            groups = self.groups
            if q.shape[0] % groups or (self.kv_heads > 1 and k.shape[0] % groups):
                groups = 1
            one_group = functools.partial(self._one_group, segments)

            q, out, lse, grad = (x.reshape(groups, -1, *x.shape[1:]) for x in (q, out, lse, grad))
            if self.kv_heads == 1:
                grads = jax.vmap(one_group, in_axes=(0, None, None, 0, 0, 0))(q, k, v, out, lse, grad)
                dq, dk, dv = grads[0], *(x.sum(0) for x in grads[1:])
                return dq.reshape(-1, *dq.shape[2:]), dk, dv
            k, v = (x.reshape(groups, -1, *x.shape[1:]) for x in (k, v))
            return tuple(x.reshape(-1, *x.shape[2:]) for x in jax.vmap(one_group)(q, k, v, out, lse, grad))

        heads, keys, rows = self._specs()
        return self._over_mesh(one_row, (heads, keys, keys, heads, rows, heads), (heads, keys, keys))

    def _one_group(self, segments: tuple, q, k, v, out, lse, grad) -> tuple[jax.Array, jax.Array, jax.Array]:
        if fits(self.positions, q.shape[-1]):
            block, _, part = (largest_block(size, self.positions) for size in _BLOCKS)
            options = {"window": self.window, "blocks": (block, part), "interpret": self.interpret}
            return flash_backward(q, k, v, out, lse, grad, *(segments or (None,)), **options)
        made = self._kernel(q.shape[0])
        options = self._options(made) | {"save_residuals": False}
        residuals = q, *map(self._heads_of, (k, v)), _segment_ids(segments), None, out, lse
        given = (*residuals, made.dq_mask_info, made.dkv_mask_info)
        grads = kernel._splash_attention_bwd(*(options[name] for name in _BACKWARD_OPTIONS), given, grad)
        dq, dk, dv = (x.astype(q.dtype) for x in grads[3:6])
        return dq, *(x[None] if self.kv_heads == 1 else x for x in (dk, dv))

    def _over_mesh(self, one_row: Callable, inputs: tuple, outputs: tuple) -> Callable:
        if self.segmented:
            inputs = (*inputs, PartitionSpec(BATCH, None))
        return over_mesh(jax.vmap(one_row), self.mesh, inputs, outputs)

    def _specs(self) -> tuple[PartitionSpec, PartitionSpec, PartitionSpec]:
        """Of queries, of keys and values, and of what has one value for each head and position."""
        keys = None if self.kv_heads % self.mesh.tensor else "tensor"
        return tuple(
            PartitionSpec(BATCH, *rest) for rest in (("tensor", None, None), (keys, None, None), ("tensor", None))
        )

    def _heads_of(self, x_KTH: jax.Array) -> jax.Array:
        return x_KTH[0] if self.kv_heads == 1 else x_KTH

    def _kernel(self, heads: int) -> kernel.SplashAttentionKernel:
        return _kernel(heads, self.kv_heads == 1, self.positions, self.window, self.interpret)

    def _options(self, made: kernel.SplashAttentionKernel) -> dict:
        names = ("mask_value", "is_mqa", "block_sizes", "residual_checkpoint_name", "mask_function", "interpret")
        return {name: made.kwargs[name] for name in names} | {"attn_logits_soft_cap": None}


# In the order of the kernel's arguments.
_BACKWARD_OPTIONS = (
    "save_residuals",
    "mask_value",
    "is_mqa",
    "block_sizes",
    "residual_checkpoint_name",
    "mask_function",
    "attn_logits_soft_cap",
    "interpret",
)


def _segment_ids(segments: tuple) -> kernel.SegmentIds | None:
    return kernel.SegmentIds(segments[0], segments[0]) if segments else None


def _kernel(heads: int, is_mqa: bool, positions: int, window: int | None, interpret: bool):
    square = (positions, positions)
    mask = masks.CausalMask(square) if window is None else masks.LocalMask(square, (window - 1, 0), 0)
    blocks = [largest_block(size, positions) for size in _BLOCKS]
    queries, keys, _ = blocks
    return kernel._make_splash_attention(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=kernel.BlockSizes(*blocks, *blocks, block_q_dq=queries, block_kv_dq=keys),
        is_mqa=is_mqa,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
