"""What Pallas kernels cost, for which the compiler states no cycles.

The table holds what attention needs for one block of 1024 queries and 1024 keys (computed 512 keys at a time, head
dimension 256), read from the compiler's own schedule of the kernels: bundles of the inner loop in the dumps of
libtpu 0.0.21 (``LIBTPU_INIT_ARGS="--xla_jf_dump_to=DIR --xla_jf_dump_llo_text=true"``), 2026-11. The blocks that
splash attention runs are taken to be those of a causal mask, n (n + 1) / 2 of n x n; blocks stepped over count
nothing. The kernel of gradients (`gemma_xla.xla.flash_backward`) takes a table of blocks; what it does once for each
block of keys is in the price of a block, at 8 of them to a row. The kernel that moves heads (`gemma_xla.xla.heads`)
waits for memory or computes, whichever takes longer. Kernels of other names, sizes and chips have no price.
"""

from __future__ import annotations

import math
import re

from gemma_xla.chips import Chip
from gemma_xla.plan.hlo import Array, Instruction

TARGET = "tpu_custom_call"

_BLOCK, _HEAD_DIM = 1024, 256
_FORWARD = r"residuals_block_kv_1024_block_kv_compute_512_.*_block_q_1024_"
_KEYS = r"block_kv_dkv_1024_block_kv_dkv_compute_512_block_q_dkv_1024_"
_QUERIES = r"block_kv_dq_1024_block_q_dq_1024_"
# Of our own kernel, by chip; with segments, which cost nothing to speak of.
_FLASH_BACKWARD = re.compile(r"(vmap_)*flash_backward_(segmented_)?1024_512(?!\d)")
_FLASH_TABLES = 5
_FLASH_CYCLES = {"v5e": 21780, "v5p": 22250}
# By chip: the name after "splash_mha_" or "splash_mqa_", the arrays it returns (scratch included: the fused backward
# kernel has more), cycles of one core.
_CYCLES = {
    "v5e": (
        (f"fwd_{_FORWARD}", 5, 9049),
        (f"fwd_segmented_{_FORWARD}", 5, 9094),
        (f"dkv_{_KEYS}", 4, 16715),
        (f"dkv_segmented_{_KEYS}", 4, 16786),
        (f"dq_{_QUERIES}", 2, 12500),
        (f"dq_segmented_{_QUERIES}", 2, 12546),
    ),
    "v5p": (
        (f"fwd_segmented_{_FORWARD}", 5, 9211),
        (f"dkv_segmented_{_KEYS}", 4, 16932),
        (f"dq_segmented_{_QUERIES}", 2, 12696),
    ),
}
# Of the kernel that moves heads, by chip: bundles of the inner loop for 1024 positions of a head of 256, moved only and
# turned too, and the part of the memory's bandwidth that a copy of float32 reaches by the compiler's own cycles.
_HEADS = re.compile(r"(?:vmap_)*heads_(?:first|last)_(turned_)?\d+_")
_HEADS_CYCLES = {"v5e": (308, 952, 0.81), "v5p": (221, 921, 0.72), "v6e": (253, 1064, 0.81)}


def kernel_name(instruction: Instruction) -> str:
    """The name of a kernel, without the number that tells its uses apart."""
    return re.sub(r"\.\d+$", "", instruction.name)


def kernel_cycles(instruction: Instruction, operands: list[Array], chip: Chip) -> float | None:
    """Cycles that a kernel takes; None where they are not known.

    Args:
        instruction: the custom call.
        operands: the arrays it takes: two of the mask, or five of blocks; queries ``[rows and groups, heads,
            sequence, head_dim]``, ...
        chip: what it runs on.
    """
    if _FLASH_BACKWARD.match(instruction.name):
        return _flash_cycles(operands[0], operands[_FLASH_TABLES], chip)
    if moves := _HEADS.match(instruction.name):
        return _heads_cycles(instruction.arrays[0], operands, bool(moves[1]), chip)
    for name, results, cycles in _CYCLES.get(chip.name, ()):
        if re.match(rf"(vmap_)*splash_m[hq]a_{name}", instruction.name) and len(instruction.arrays) == results:
            *heads, num_queries, head_dim = operands[2].dims
            if head_dim == _HEAD_DIM and operands[3].dims[-2] == num_queries and num_queries % _BLOCK == 0:
                side = num_queries // _BLOCK
                # The forward kernel declares heads independent too.
                cores = _cores(chip, heads if name.startswith("fwd") else heads[:-1])
                return math.prod(heads) * side * (side + 1) // 2 * cycles / cores
    return None


def _flash_cycles(table: Array, queries: Array, chip: Chip) -> float | None:
    *heads, _, head_dim = queries.dims
    if head_dim != _HEAD_DIM or chip.name not in _FLASH_CYCLES:
        return None
    return math.prod(heads) * table.num_elements * _FLASH_CYCLES[chip.name] / _cores(chip, heads[:-1])


def _heads_cycles(moved: Array, operands: list[Array], turned: bool, chip: Chip) -> float | None:
    if chip.name not in _HEADS_CYCLES:
        return None
    *cycles, reached = _HEADS_CYCLES[chip.name]
    computing = moved.num_elements / (_BLOCK * _HEAD_DIM) * cycles[turned] / chip.cores.value
    num_bytes = moved.num_bytes + sum(operand.num_bytes for operand in operands)
    return max(computing, num_bytes / (chip.hbm_bandwidth.value * reached) * chip.clock.value)


def _cores(chip: Chip, independent: list[int]) -> int:
    """How many cores share out what a kernel declares independent, as rows and groups of heads are.

    Seen in the trips of each core's loop.
    """
    return math.gcd(int(chip.cores.value), math.prod(independent))
