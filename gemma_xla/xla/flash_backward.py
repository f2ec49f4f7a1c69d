"""The gradients of causal attention in one Pallas kernel for TPUs (arXiv:2205.14135, algorithm 4).

Splash attention's own backward pass is two kernels, and each of them computes scores and their gradients: seven
products for each block of queries and keys. Here one kernel does with five. It takes the blocks of keys in turn, and
for each one the blocks of queries that see it; the gradients of all queries of a head stay on the chip meanwhile, in
float32, and so do those of keys and values that several heads share.

Shape letters: N query heads, K key/value heads, T positions, H head_dim; in the kernel Q positions of a block of
queries, C of the part of a block of keys that is computed at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# What the kernel may take of a core's own memory, and what of it is for the gradients of whole heads.
_VMEM, _FOR_HEADS = 56 * 2**20, 32 * 2**20
# A finite filler: products with it must not become NaN.
_HIDDEN = -0.7 * float(np.finfo(np.float32).max)
_SUBLANES, _LANES = 8, 128


def fits(positions: int, head_dim: int) -> bool:
    """Whether the gradients of one head's queries, keys and values have room on the chip."""
    return 3 * positions * head_dim * 4 <= _FOR_HEADS


def steps(positions: int, block: int, window: int | None) -> np.ndarray:
    """The blocks that hold something to see, in the order they are computed: ``[5, steps]``, int32.

    The rows: the block of queries, that of keys, whether it is the first and the last of these keys, and the first of
    these queries. The first of any keys is also the last of its queries: the one on the diagonal.
    """
    count = positions // block
    # The queries that see a block's last key end `window` after it.
    ends = [
        count if window is None else min(count, (((j + 1) * block + window - 2) // block) + 1) for j in range(count)
    ]
    seen = [(i, j) for j, end in enumerate(ends) for i in range(j, end)]
    met = [next(j for j, end in enumerate(ends) if i < end) for i in range(count)]
    return np.array([(i, j, i == j, i == ends[j] - 1, met[i] == j) for i, j in seen], dtype=np.int32).T


def flash_backward(
    q_NTH: jax.Array,
    k_KTH: jax.Array,
    v_KTH: jax.Array,
    out_NTH: jax.Array,
    lse_NT: jax.Array,
    grad_NTH: jax.Array,
    segment_ids_T: jax.Array | None,
    *,
    window: int | None,
    blocks: tuple[int, int],
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the gradients of queries, keys and values, in their shapes and types.

    Args:
        q_NTH: queries, scaled.
        k_KTH: keys; K divides N.
        v_KTH: values.
        out_NTH: what attention gave.
        lse_NT: the logarithm of each query's sum of exponentiated scores, float32.
        grad_NTH: the gradient of ``out_NTH``.
        segment_ids_T: the document of each position, int32.
        window: positions a query sees, itself included; None: all before it.
        blocks: positions in a block of queries or keys, a multiple of 128, and in the part of it that is computed at a
            time; T is a multiple of the former, and that of the latter.
        interpret: run the kernel as plain operations, on any device.
    """
    num_heads, positions, head_dim = q_NTH.shape
    shared = num_heads // k_KTH.shape[0]
    block, _ = blocks
    table = steps(positions, block, window)
    mean_NT = (out_NTH.astype(jnp.float32) * grad_NTH.astype(jnp.float32)).sum(-1)

    def spec(shape: tuple, index: Callable) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda head, step, q, kv, *_: index(head, q[step], kv[step]))

    def rows(x: jax.Array) -> jax.Array:
        """As many equal rows as a register has."""
        return jnp.broadcast_to(x[..., None, :], (*x.shape[:-1], _SUBLANES, positions))

    of_queries = spec((None, block, head_dim), lambda head, q, kv: (head, q, 0))
    of_keys = spec((None, block, head_dim), lambda head, q, kv: (head // shared, kv, 0))
    # Done with when the block of keys is that on the diagonal, and sent before the next one.
    of_done = spec((None, block, head_dim), lambda head, q, kv: (head, kv, 0))
    of_each = spec((None, _SUBLANES, block), lambda head, q, kv: (head, 0, q))
    of_all = spec((_SUBLANES, block), lambda head, q, kv: (0, q))
    inputs = [q_NTH, k_KTH, v_KTH, grad_NTH, rows(lse_NT), rows(mean_NT), rows(jnp.arange(positions, dtype=jnp.int32))]
    specs = [of_queries, of_keys, of_keys, of_queries, of_each, of_each, of_all]
    if segment_ids_T is not None:
        # For keys as columns, one in each lane.
        inputs += [rows(segment_ids_T), jnp.broadcast_to(segment_ids_T[:, None], (positions, _LANES))]
        specs += [of_all, spec((block, _LANES), lambda head, q, kv: (kv, 0))]
    name = f"flash_backward_{'segmented_' if segment_ids_T is not None else ''}{'_'.join(map(str, blocks))}"
    scratch = [(block, head_dim)] * 3 + [(positions, head_dim)] * (1 if shared == 1 else 3)
    call = pl.pallas_call(
        functools.partial(_kernel, len(specs), shared, window, blocks),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(table),
            grid=(num_heads, table.shape[1]),
            in_specs=specs,
            out_specs=[of_done, of_keys, of_keys],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q_NTH, k_KTH, v_KTH)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=_VMEM),
        name=name,
        interpret=interpret,
    )
    with jax.named_scope(name):
        return call(*table, *inputs)


def _kernel(num_inputs: int, shared: int, window: int | None, blocks: tuple[int, int], *refs) -> None:
    (q_of, kv_of, first_of, last_of, fresh_of), refs = refs[:5], refs[5:]
    (q, k, v, grad, lse, mean, at_query, *segments), refs = refs[:num_inputs], refs[num_inputs:]
    (dq, dk, dv, sum_q, sum_k, sum_v, all_q), all_kv = refs[:7], refs[7:]
    block, part = blocks
    head, step = pl.program_id(0), pl.program_id(1)
    queries = pl.ds(pl.multiple_of(q_of[step] * block, block), block)
    keys = pl.ds(pl.multiple_of(kv_of[step] * block, block), block)

    @pl.when(first_of[step] == 1)
    def _():
        sum_k[...] = jnp.zeros_like(sum_k)
        sum_v[...] = jnp.zeros_like(sum_v)

    sum_q[...] = jnp.zeros_like(sum_q)
    for start in range(0, block, part):
        here = pl.ds(start, part)
        k_CH, q_QH, grad_QH = k[here, :], q[...], grad[...]
        scores_CQ = _product(k_CH, q_QH, 1, 1)
        at_key_CQ = kv_of[step] * block + start + jax.lax.broadcasted_iota(jnp.int32, scores_CQ.shape, 0)
        visible_CQ = at_query[:1, :] >= at_key_CQ
        if window is not None:
            visible_CQ &= at_query[:1, :] - window < at_key_CQ
        if segments:
            of_queries, of_keys = segments
            # A copy of registers; `tile` would cost the kernel a tenth of its speed.
            visible_CQ &= pltpu.repeat(of_keys[here, :], block // _LANES, axis=1) == of_queries[:1, :]
        probs_CQ = jnp.exp(jnp.where(visible_CQ, scores_CQ, _HIDDEN) - lse[:1, :])
        sum_v[here, :] += _product(probs_CQ.astype(grad_QH.dtype), grad_QH, 1, 0)
        grad_scores_CQ = (_product(v[here, :], grad_QH, 1, 1) - mean[:1, :]) * probs_CQ
        sum_k[here, :] += _product(grad_scores_CQ.astype(q_QH.dtype), q_QH, 1, 0)
        sum_q[...] += _product(grad_scores_CQ.T.astype(k_CH.dtype), k_CH, 1, 0)

    _add(all_q, queries, sum_q, fresh_of[step] == 1)

    @pl.when(first_of[step] == 1)
    def _():
        dq[...] = all_q[queries, :].astype(dq.dtype)

    @pl.when(last_of[step] == 1)
    def _():
        for out, own, of_heads in zip((dk, dv), (sum_k, sum_v), all_kv or (None, None), strict=True):
            if of_heads is None:
                out[...] = own[...].astype(out.dtype)
            else:
                # Each head sends what there is so far; the last one's stays.
                _add(of_heads, keys, own, head % shared == 0)
                out[...] = of_heads[keys, :].astype(out.dtype)


def _add(total, at: pl.ds, part, fresh: jax.Array) -> None:
    """Add to a place of ``total``, whose contents do not count where it is ``fresh``."""

    @pl.when(fresh)
    def _():
        total[at, :] = part[...]

    @pl.when(jnp.logical_not(fresh))
    def _():
        total[at, :] += part[...]


def _product(left: jax.Array, right: jax.Array, left_summed: int, right_summed: int) -> jax.Array:
    dims = (((left_summed,), (right_summed,)), ((), ()))
    return jax.lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)
