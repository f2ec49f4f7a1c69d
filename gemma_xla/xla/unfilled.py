"""Memory that a loop fills piece by piece, without filling it with zeros first."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch_xla
import torch_xla.core.xla_builder as xb
import torch_xla.distributed.spmd as xs
from torch.overrides import TorchFunctionMode

from gemma_xla.sharding import BATCH, MeshShape
from gemma_xla.xla.tpu import JAX_DTYPES, is_for_tpu, lower_for_tpu, over_mesh


class Unfilled(TorchFunctionMode):
    """While it lasts, the zeros in which a loop on a TPU collects its results are memory as it comes.

    They are ``[iterations, rows, ...]``, the rows split over the devices. Each is written before it is read.
    """

    def outside(self, body: Callable) -> Callable:
        """Return the loop's body; the zeros that it makes are zeros."""

        def run(*args):
            with torch._C.DisableTorchFunction():
                return body(*args)

        return run

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.zeros and is_for_tpu():
            return _unfilled(*args, **kwargs)
        return func(*args, **(kwargs or {}))


def _unfilled(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    mesh = MeshShape(*xs.get_global_mesh().mesh_shape)
    if mesh.tensor > 1 or len(shape) < 2 or shape[1] % mesh.batch_shards or dtype not in JAX_DTYPES:
        # Along the tensor axis some are split and some are not.
        return torch.zeros(shape, device=device, dtype=dtype)
    # A computation takes something at least.
    something = torch.zeros((), device=device)
    computation = _computation(tuple(shape), dtype, mesh)
    return torch_xla._XLAC._xla_user_computation("gemma_xla::unfilled", [something], computation)[0]


@functools.cache
def _computation(shape: tuple[int, ...], dtype: torch.dtype, mesh: MeshShape):
    import jax
    from jax.sharding import PartitionSpec

    part = (shape[0], shape[1] // mesh.batch_shards, *shape[2:])
    result = jax.ShapeDtypeStruct(part, JAX_DTYPES[dtype])

    def allocate(_):
        # The compiler's own name for it; the first version of custom calls' interface is the one it knows.
        return jax.ffi.ffi_call("AllocateBuffer", result, custom_call_api_version=1)()

    outputs = PartitionSpec(None, BATCH, *(None for _ in shape[2:]))
    hlo = lower_for_tpu(over_mesh(allocate, mesh, (PartitionSpec(),), outputs), (((), torch.float32),))
    return xb.computation_from_module_proto("unfilled", hlo)
