"""A TPU kernel as an implementation of `gemma_xla.model.attention`.

Shape letters: B batch rows, T positions, N query heads, K key/value heads, H head_dim.
"""

from __future__ import annotations

import functools

import torch
import torch_xla
import torch_xla.core.xla_builder as xb

from gemma_xla.model.attention import IMPLEMENTATIONS, Mask
from gemma_xla.model.config import splash_takes
from gemma_xla.model.kept import kept
from gemma_xla.sharding import MeshShape
from gemma_xla.xla.tpu import Signature, cores, lower_for_tpu


def use_splash(mesh: MeshShape) -> None:
    """Make "splash" an implementation of attention, for the devices of ``mesh``."""

    def splash(q_BTNH, k_BTKH, v_BTKH, mask: Mask, window: int | None) -> torch.Tensor:
        if mask.q_index_T is not None or not splash_takes(q_BTNH.shape[-1], q_BTNH.shape[1]):
            return IMPLEMENTATIONS["reference"](q_BTNH, k_BTKH, v_BTKH, mask, window)
        if k_BTKH.shape[2] > 1 and k_BTKH.shape[2] % mesh.tensor:
            # Where the heads of keys cannot be dealt out, each query's head gets its own.
            k_BTKH, v_BTKH = (x.repeat_interleave(q_BTNH.shape[2] // x.shape[2], 2) for x in (k_BTKH, v_BTKH))
        segments = () if mask.segment_ids_BS is None else (mask.segment_ids_BS.int(),)
        heads = (x.transpose(1, 2) for x in (q_BTNH * q_BTNH.shape[-1] ** -0.5, k_BTKH, v_BTKH))
        return _Splash.apply(*heads, segments, window, mesh).transpose(1, 2)

    IMPLEMENTATIONS["splash"] = splash


class _Splash(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BNTH, k_BKTH, v_BKTH, segments, window, mesh):
        tensors = [q_BNTH, k_BKTH, v_BKTH]
        out, lse = kept().compute("attention", lambda: _call("forward", [*tensors, *segments], window, mesh))
        ctx.save_for_backward(*tensors, out, lse)
        ctx.rest = segments, window, mesh
        return out

    @staticmethod
    def backward(ctx, grad_out):
        segments, window, mesh = ctx.rest
        grads = _call("backward", [*ctx.saved_tensors, grad_out, *segments], window, mesh)
        return *grads, None, None, None


def _call(direction: str, tensors: list[torch.Tensor], window: int | None, mesh: MeshShape) -> list[torch.Tensor]:
    signature = tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors)
    computation = _computation(direction, signature, window, mesh)
    return torch_xla._XLAC._xla_user_computation(f"gemma_xla::splash_{direction}", tensors, computation)


@functools.cache
def _computation(direction: str, signature: Signature, window: int | None, mesh: MeshShape):
    """The kernel for a TPU, whatever this process runs on."""
    from gemma_xla.xla.splash import Attention

    (queries, _), (keys, _) = signature[:2]
    attention = Attention(
        kv_heads=keys[1],
        positions=queries[2],
        window=window,
        mesh=mesh,
        segmented=len(signature) % 3 == 1,
        groups=cores(),
    )
    hlo = lower_for_tpu(getattr(attention, direction)(), signature)
    return xb.computation_from_module_proto(f"splash_{direction}", hlo)
