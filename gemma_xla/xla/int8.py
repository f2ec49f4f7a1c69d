"""Products of 8-bit integers on XLA devices."""

from __future__ import annotations

import torch
import torch_xla

from gemma_xla.model.int8 import Dims
from gemma_xla.sharding import MeshShape
from gemma_xla.xla.tpu import in_rows, is_for_tpu


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
        # Where a matrix unit has to turn its left matrix, it multiplies integers at the speed of bfloat16 (TPU v5e).
        # The compiler, left to itself, lays matrices out in such a way, and takes either of them for the left one.
        left, left_summed = in_rows(left, mesh, last=left_summed), left.dim() - 1
        if not batch[1]:
            right, right_summed = in_rows(right, mesh, last=right_summed, split=False), right.dim() - 1
    dims = (([left_summed], [right_summed]), batch)
    return torch_xla._XLAC._xla_dot_general(left, right, dims, preferred_element_type=torch.int32)
