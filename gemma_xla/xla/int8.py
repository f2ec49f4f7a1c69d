"""Products of 8-bit integers on XLA devices."""

from __future__ import annotations

import functools

import torch
import torch_xla
import torch_xla.core.xla_builder as xb

from gemma_xla.model.int8 import Dims
from gemma_xla.sharding import BATCH, MeshShape
from gemma_xla.xla.tpu import is_for_tpu, lower_for_tpu, over_mesh


def int8_dot(left: torch.Tensor, right: torch.Tensor, dims: Dims, mesh: MeshShape) -> torch.Tensor:
    """Multiply int8 tensors, summing in int32.

    Args:
        left: of three dimensions, the first split over the devices.
        right: split as ``left`` where that is the batch of the product; otherwise whole on each device.
        dims: as in `gemma_xla.model.int8.int8_dot`, with one dimension that is summed over.
        mesh: the devices. With a tensor axis other dimensions may be split.
    """
    ([left_summed], [right_summed]), batch = dims
    if is_for_tpu() and mesh.tensor == 1:
        left, left_summed = _rows(left, left_summed, True, mesh)
        if not batch[1]:
            right, right_summed = _rows(right, right_summed, False, mesh)
    dims = (([left_summed], [right_summed]), batch)
    return torch_xla._XLAC._xla_dot_general(left, right, dims, preferred_element_type=torch.int32)


def _rows(x: torch.Tensor, summed: int, split: bool, mesh: MeshShape) -> tuple[torch.Tensor, int]:
    """The tensor with what is summed over as its last dimension, in memory too, and the number of that dimension.

    Where a matrix unit has to turn its left matrix, it multiplies integers at the speed of bfloat16 (TPU v5e). The
    compiler, left to itself, lays matrices out in such a way, and takes either of them for the left one.
    """
    computation = _to_rows(tuple(x.shape), summed, split, mesh)
    return torch_xla._XLAC._xla_user_computation("gemma_xla::rows", [x], computation)[0], x.dim() - 1


@functools.cache
def _to_rows(shape: tuple[int, ...], summed: int, split: bool, mesh: MeshShape):
    from jax.experimental.layout import Layout, with_layout_constraint
    from jax.numpy import moveaxis
    from jax.sharding import PartitionSpec

    def to_rows(x):
        return with_layout_constraint(moveaxis(x, summed, -1), Layout(tuple(range(len(shape)))))

    axes = PartitionSpec(BATCH if split else None, *(None for _ in shape[1:]))
    hlo = lower_for_tpu(over_mesh(to_rows, mesh, (axes,), axes), ((shape, torch.int8),))
    return xb.computation_from_module_proto("rows", hlo)
