"""What Pallas kernels cost, for which the compiler states no cycles.

The table holds what splash attention needs for one block of 1024 queries and 1024 keys (computed 512 keys at a time,
head dimension 256), read from the compiler's own schedule of the kernels: bundles of the inner loop in the dumps of
libtpu 0.0.21 (``LIBTPU_INIT_ARGS="--xla_jf_dump_to=DIR --xla_jf_dump_llo_text=true"``), 2026-11. The blocks that run
are taken to be those of a causal mask, n (n + 1) / 2 of n x n. Kernels of other names, sizes and chips have no price.
"""

from __future__ import annotations

import math
import re

from gemma_xla.chips import Chip
from gemma_xla.plan.hlo import Array, Instruction

TARGET = "tpu_custom_call"

_BLOCK, _HEAD_DIM = 1024, 256
# By chip: pattern of the name, arrays it returns (scratch included: the fused backward kernel has more), cycles.
_CYCLES = {
    "v5e": (
        (r"splash_m[hq]a_fwd_residuals_block_kv_1024_block_kv_compute_512_.*_block_q_1024_", 5, 9049),
        (r"splash_m[hq]a_dkv_block_kv_dkv_1024_block_kv_dkv_compute_512_block_q_dkv_1024_", 4, 16715),
        (r"splash_m[hq]a_dq_block_kv_dq_1024_block_q_dq_1024_", 2, 12500),
    )
}


def kernel_name(instruction: Instruction) -> str:
    """The name of a kernel, without the number that tells its uses apart."""
    return re.sub(r"\.\d+$", "", instruction.name)


def kernel_cycles(instruction: Instruction, operands: list[Array], chip: Chip) -> int | None:
    """Cycles that a kernel takes; None where they are not known.

    Args:
        instruction: the custom call.
        operands: the arrays it takes: two of the mask, queries ``[..., heads, sequence, head_dim]``, keys, ...
        chip: what it runs on.
    """
    for name, results, cycles in _CYCLES.get(chip.name, ()):
        if re.match(name, instruction.name) and len(instruction.arrays) == results:
            *heads, num_queries, head_dim = operands[2].dims
            if head_dim == _HEAD_DIM and operands[3].dims[-2] == num_queries and num_queries % _BLOCK == 0:
                side = num_queries // _BLOCK
                return math.prod(heads) * side * (side + 1) // 2 * cycles
    return None
