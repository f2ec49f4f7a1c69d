"""JAX functions for a TPU as parts of PyTorch/XLA's graphs, whatever this process runs on."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch
import torch_xla
import torch_xla.core.xla_builder as xb
import torch_xla.runtime as xr

from gemma_xla.chips import Chip, topology
from gemma_xla.errors import UserError
from gemma_xla.sharding import AXES, BATCH, MeshShape, Spec

# Shape and type of each argument.
Signature = tuple[tuple[tuple[int, ...], torch.dtype], ...]

JAX_DTYPES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.int8: "int8",
    torch.int32: "int32",
    torch.bool: "bool",
}
# The version of Mosaic's code that this release's libtpu reads; without a TPU, jax would ask for a newer one.
_MOSAIC_VERSION = 7

_recording: Chip | None = None


def record_for_tpu(chip: Chip) -> None:
    """From now on what this process records is compiled for such a TPU, though it has none."""
    global _recording
    _recording = chip


def is_for_tpu() -> bool:
    """Whether what is recorded is for a TPU."""
    return _recording is not None or xr.device_type() == "TPU"


def cores() -> int:
    """How many cores of the TPU's chips share out a kernel; 1 for a chip that the catalogue lacks."""
    chip = _recording
    if chip is None and xr.device_type() == "TPU":
        with contextlib.suppress(UserError):
            chip = topology(torch_xla.tpu.get_tpu_env()["ACCELERATOR_TYPE"]).chip
    return 1 if chip is None else int(chip.cores.value)


def over_mesh(function: Callable, mesh: MeshShape, inputs: tuple, outputs: tuple) -> Callable:
    """Return the JAX function that runs ``function`` on each device's part.

    Args:
        function: of the parts.
        mesh: the devices.
        inputs: how each argument is split: PartitionSpecs.
        outputs: how each result is.
    """
    import jax
    from jax.sharding import AbstractMesh

    if mesh.num_devices == 1:
        return function
    devices = AbstractMesh(tuple(getattr(mesh, axis) for axis in AXES), AXES)
    return jax.shard_map(function, mesh=devices, in_specs=inputs, out_specs=outputs, check_vma=False)


def largest_block(size: int, positions: int) -> int:
    """The largest block of at most ``size`` positions, a multiple of 128, that divides all of them."""
    return next(block for block in range(size, 0, -128) if positions % block == 0)


def in_rows(x: torch.Tensor, mesh: MeshShape, *, last: int = -1, spec: Spec | None = None) -> torch.Tensor:
    """Return a tensor with dimension ``last`` as its last one, side by side in memory whatever the compiler prefers.

    Args:
        x: a tensor; on other devices than TPUs it is laid out as they like.
        mesh: the devices.
        last: a dimension.
        spec: how ``x`` is split; None: its first dimension over the batch's devices.
    """
    last %= x.dim()
    if not is_for_tpu():
        return x.movedim(last, -1)
    spec = (BATCH, *(None for _ in x.shape[1:])) if spec is None else spec
    computation = _to_rows(tuple(x.shape), x.dtype, last, spec, mesh)
    return torch_xla._XLAC._xla_user_computation("gemma_xla::in_rows", [x], computation)[0]


@functools.cache
def _to_rows(shape: tuple[int, ...], dtype: torch.dtype, last: int, spec: Spec, mesh: MeshShape):
    from jax.experimental.layout import Layout, with_layout_constraint
    from jax.numpy import moveaxis
    from jax.sharding import PartitionSpec

    def to_rows(x):
        return with_layout_constraint(moveaxis(x, last, -1), Layout(tuple(range(len(shape)))))

    moved = (*spec[:last], *spec[last + 1 :], spec[last])
    split = over_mesh(to_rows, mesh, (PartitionSpec(*spec),), PartitionSpec(*moved))
    hlo = lower_for_tpu(split, ((shape, dtype),))
    return xb.computation_from_module_proto("in_rows", hlo)


def lower_for_tpu(function: Callable, signature: Signature) -> bytes:
    """A JAX function as a serialized HloModuleProto."""
    import jax
    import jax._src.tpu_custom_call as mosaic
    from jax._src.config import use_shardy_partitioner

    # It only writes the graph: the TPU, if there is one, is PyTorch/XLA's, and cannot be shared.
    jax.config.update("jax_platforms", "cpu")
    arguments = [jax.ShapeDtypeStruct(shape, JAX_DTYPES[dtype]) for shape, dtype in signature]
    version, mosaic.get_ir_version = mosaic.get_ir_version, lambda _context: _MOSAIC_VERSION
    try:
        # GSPMD, as PyTorch/XLA: its successor writes annotations of another kind.
        with use_shardy_partitioner(False):
            lowered = jax.jit(function, keep_unused=True).trace(*arguments).lower(lowering_platforms=("tpu",))
    finally:
        mosaic.get_ir_version = version
    return lowered.compiler_ir("hlo").as_serialized_hlo_module_proto()
