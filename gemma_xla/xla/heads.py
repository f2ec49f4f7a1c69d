"""Heads moved to the front, as attention's kernels take them, and turned by rotary embeddings on the way, in one Pallas
kernel for TPUs.

Left to the compiler, heads are moved by copies, in float32 those that are turned, and their halves are swapped by
products.

Shape letters: B batch rows, T positions, N heads of queries, keys or values, H head_dim.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from gemma_xla.sharding import BATCH, MeshShape
from gemma_xla.xla.tpu import largest_block, over_mesh

# Positions of one head that are moved at a time.
_BLOCK = 1024


def heads_first(
    heads: int, mesh: MeshShape, *, turned: bool, scale: float = 1.0, back: bool = False, interpret: bool = False
):
    """Return the function that maps ``[B, T, N, H]`` to ``[B, N, T, H]``, or, with ``back``, the other way.

    Args:
        heads: N, of the whole model; each device of the mesh's tensor axis has its part of them, if they can be dealt.
        mesh: the devices; batch rows are split over data and fsdp.
        turned: whether the function takes cosines and sines too, ``[B, T, H/2]``, float32, and turns each pair (first
            half, second half) by its position's angle in float32; ``back``: the other way, as the gradient is.
        scale: what is turned is multiplied by it, too.
        back: the gradient of the other direction.
        interpret: run the kernel as plain operations, on any device; for tests.
    """
    dealt = None if heads % mesh.tensor else "tensor"
    last, first = PartitionSpec(BATCH, None, dealt, None), PartitionSpec(BATCH, dealt, None, None)
    tables = (PartitionSpec(BATCH, None, None),) * (2 if turned else 0)
    one_row = functools.partial(_one_row, scale=scale, back=back, interpret=interpret)
    inputs, outputs = ((first, *tables), last) if back else ((last, *tables), first)
    return over_mesh(jax.vmap(one_row), mesh, inputs, outputs)


def _one_row(x: jax.Array, *tables: jax.Array, scale: float, back: bool, interpret: bool) -> jax.Array:
    positions, heads, head_dim = (x.shape[1], x.shape[0], x.shape[2]) if back else x.shape
    block = largest_block(_BLOCK, positions)
    # Heads side by side, and apart.
    beside = pl.BlockSpec((block, head_dim), lambda at, head: (at, head))
    apart = pl.BlockSpec((None, block, head_dim), lambda at, head: (head, at, 0))
    angles = pl.BlockSpec((block, head_dim // 2), lambda at, head: (at, 0))
    shapes = (positions, heads * head_dim), (heads, positions, head_dim)
    name = f"heads_{'last' if back else 'first'}_{'turned_' if tables else ''}{block}"
    call = pl.pallas_call(
        functools.partial(_kernel, scale, back),
        # A position's angles stay where they are for all heads.
        grid=(positions // block, heads),
        in_specs=[apart if back else beside, *(angles for _ in tables)],
        out_specs=beside if back else apart,
        out_shape=jax.ShapeDtypeStruct(shapes[0] if back else shapes[1], x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        name=name,
        interpret=interpret,
    )
    with jax.named_scope(name):
        out = call(x if back else x.reshape(shapes[0]), *tables)
    return out.reshape(positions, heads, head_dim) if back else out


def _kernel(scale: float, back: bool, x, *refs) -> None:
    *tables, out = refs
    if not tables:
        out[...] = x[...]
        return
    cos, sin = tables
    half = cos.shape[-1]
    first, second = (part.astype(jnp.float32) for part in (x[:, :half], x[:, half:]))
    along, across = cos[...] * scale, sin[...] * (-scale if back else scale)
    out[:, :half] = (first * along - second * across).astype(out.dtype)
    out[:, half:] = (second * along + first * across).astype(out.dtype)
