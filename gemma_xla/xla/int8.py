"""Products of 8-bit integers on XLA devices."""

from __future__ import annotations

import torch
import torch_xla

from gemma_xla.model.linear import Dims
from gemma_xla.sharding import MeshShape, Spec
from gemma_xla.xla.graph import fenced
from gemma_xla.xla.tpu import in_rows, is_for_tpu

# Columns that lie side by side in a TPU's memory: narrower parts are laid out anew once they are gathered.
_LANES = 128


def int8_dot(left: torch.Tensor, right: torch.Tensor, dims: Dims, mesh: MeshShape) -> torch.Tensor:
    """Multiply int8 tensors, summing in int32.

    Args:
        left: the first dimension is split over the devices.
        right: split as ``left`` where that is the batch of the product; otherwise a matrix, whole on each device.
        dims: as in `gemma_xla.model.linear.int8_dot`.
        mesh: the devices. With a tensor axis other dimensions may be split.
    """
    (left_summed, right_summed), batch = dims
    if is_for_tpu() and mesh.tensor == 1:
        # Where a matrix unit has to turn its left matrix, it multiplies integers at the speed of bfloat16 (TPU v5e).
        # The compiler, left to itself, lays matrices out in such a way, and takes either of them for the left one.
        left, left_summed = _side_by_side(left, left_summed, mesh)
        if not batch[1]:
            right, right_summed = _side_by_side(right, right_summed, mesh, (None, None))
    dims = ((left_summed, right_summed), batch)
    return torch_xla._XLAC._xla_dot_general(left, right, dims, preferred_element_type=torch.int32)


def _side_by_side(
    x: torch.Tensor, summed: list[int], mesh: MeshShape, spec: Spec | None = None
) -> tuple[torch.Tensor, list[int]]:
    """The last of the dimensions that are summed over as the last in memory; and where those dimensions are now."""
    *others, last = summed
    return in_rows(x, mesh, last=last, spec=spec), [*(i - (i > last) for i in others), x.dim() - 1]


def laid_out(matrix: torch.Tensor, spec: Spec, turned: bool, mesh: MeshShape) -> torch.Tensor | None:
    """Return a matrix, or its transpose, that lies in memory row by row and is split as it was; None: needless.

    A layer that is run again in its backward pass sums over one dimension of a weight, and then over the other. Left to
    itself, the compiler lays both out alike, and one of the two products runs at the speed of bfloat16 (TPU v5p).

    Args:
        matrix: int8, split as ``spec``.
        spec: how each dimension is split.
        turned: whether it is the transpose, from a copy of its own.
        mesh: the devices.
    """
    if not is_for_tpu() or mesh.tensor > 1 or matrix.shape[0] // mesh.ways(spec[0]) % _LANES:
        return None
    return in_rows(fenced(matrix), mesh, last=0, spec=spec) if turned else in_rows(matrix, mesh, spec=spec)
