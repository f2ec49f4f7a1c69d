"""TPU kernels for `gemma_xla.model.attention`, and for what comes before it in a layer.

Shape letters: B batch rows, T positions, N query heads, K key/value heads, H head_dim.
"""

from __future__ import annotations

import functools

import torch
import torch_xla
import torch_xla.core.xla_builder as xb

from gemma_xla.model.attention import IMPLEMENTATIONS, Mask
from gemma_xla.model.config import heads_first_takes, splash_takes
from gemma_xla.model.kept import kept
from gemma_xla.model.layers import GemmaAttention
from gemma_xla.sharding import MeshShape
from gemma_xla.xla.tpu import Signature, cores, lower_for_tpu


def use_splash(mesh: MeshShape) -> None:
    """Make "splash" an implementation of attention, for the devices of ``mesh``."""

    def splash(q_BTNH, k_BTKH, v_BTKH, mask: Mask, window: int | None, scale: float) -> torch.Tensor:
        if mask.q_index_T is not None or not splash_takes(q_BTNH.shape[-1], q_BTNH.shape[1]):
            return IMPLEMENTATIONS["reference"](q_BTNH, k_BTKH, v_BTKH, mask, window, scale)
        if k_BTKH.shape[2] > 1 and k_BTKH.shape[2] % mesh.tensor:
            # Where the heads of keys cannot be dealt out, each query's head gets its own.
            k_BTKH, v_BTKH = (x.repeat_interleave(q_BTNH.shape[2] // x.shape[2], 2) for x in (k_BTKH, v_BTKH))
        segments = () if mask.segment_ids_BS is None else (mask.segment_ids_BS.int(),)
        q_BTNH = q_BTNH if scale == 1 else q_BTNH * scale
        heads = (x.transpose(1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
        return _Splash.apply(*heads, segments, window, mesh).transpose(1, 2)

    IMPLEMENTATIONS["splash"] = splash


def use_heads_first(attention: GemmaAttention, mesh: MeshShape) -> None:
    """Have a layer turn queries and keys, and move their heads and those of values to the front, in one kernel.

    They come back as views that look as they did: what takes them apart again, as "splash" does, moves nothing. A layer
    whose heads are of another size than the kernel takes stays as it is.
    """
    head_dim, plain, scale = attention.head_dim, attention.turned, attention.scale
    if not heads_first_takes(head_dim):
        return

    def turned(q_BTNH, k_BTKH, v_BTKH, cos, sin):
        if q_BTNH.dtype != torch.bfloat16 or not splash_takes(head_dim, q_BTNH.shape[1]):
            q_BTNH, k_BTKH, v_BTKH = plain(q_BTNH, k_BTKH, v_BTKH, cos, sin)
            return q_BTNH * scale, k_BTKH, v_BTKH
        tables = [table.squeeze(2).expand(len(q_BTNH), -1, -1) for table in (cos, sin)]
        # A single head is at the front.
        v_BTKH = v_BTKH if v_BTKH.shape[2] == 1 else _HeadsFirst.apply(v_BTKH, 1.0, mesh)
        # Attention multiplies queries by a power of two, so that it may be done before they are rounded.
        return _HeadsFirst.apply(q_BTNH, scale, mesh, *tables), _HeadsFirst.apply(k_BTKH, 1.0, mesh, *tables), v_BTKH

    attention.turned, attention.scale = turned, 1.0


class _HeadsFirst(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BTNH, scale, mesh, *tables):
        ctx.save_for_backward(*tables)
        ctx.rest = scale, mesh
        return _moved([x_BTNH, *tables], scale, mesh).transpose(1, 2)

    @staticmethod
    def backward(ctx, grad_BTNH):
        grad_BNTH = grad_BTNH.transpose(1, 2)
        return _moved([grad_BNTH, *ctx.saved_tensors], *ctx.rest, back=True), *(None for _ in ctx.needs_input_grad[1:])


def _moved(tensors: list[torch.Tensor], scale: float, mesh: MeshShape, back: bool = False) -> torch.Tensor:
    computation = _heads_computation(_signature(tensors), scale, mesh, back)
    return torch_xla._XLAC._xla_user_computation("gemma_xla::heads_first", tensors, computation)[0]


@functools.cache
def _heads_computation(signature: Signature, scale: float, mesh: MeshShape, back: bool):
    from gemma_xla.xla.heads import heads_first

    heads = signature[0][0][1 if back else 2]
    function = heads_first(heads, mesh, turned=len(signature) > 1, scale=scale, back=back)
    return xb.computation_from_module_proto("heads_first", lower_for_tpu(function, signature))


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
    computation = _computation(direction, _signature(tensors), window, mesh)
    return torch_xla._XLAC._xla_user_computation(f"gemma_xla::splash_{direction}", tensors, computation)


def _signature(tensors: list[torch.Tensor]) -> Signature:
    return tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors)


@functools.cache
def _computation(direction: str, signature: Signature, window: int | None, mesh: MeshShape):
    """The kernel for a TPU, whatever this process runs on."""
    from gemma_xla.xla.splash import Attention

    (queries, _), (keys, _) = signature[:2]
    rows_of_a_device = queries[0] // mesh.batch_shards
    attention = Attention(
        kv_heads=keys[1],
        positions=queries[2],
        window=window,
        mesh=mesh,
        segmented=len(signature) % 3 == 1,
        # Rows are independent anyway.
        groups=1 if rows_of_a_device % cores() == 0 else cores(),
    )
    hlo = lower_for_tpu(getattr(attention, direction)(), signature)
    return xb.computation_from_module_proto(f"splash_{direction}", hlo)
