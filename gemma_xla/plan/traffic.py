"""Bytes that an instruction moves which the compiler gives no cycles."""

from __future__ import annotations

from gemma_xla.plan.hlo import Computation, Instruction, Module

# They compute nothing, or (transfers) run beside what does.
FREE = frozenset((
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "partition-id", "replica-id", "after-all",
    "add-dependency", "opt-barrier", "copy-start", "slice-start",
))  # fmt: skip
# What they take is no matter of bytes.
UNPRICED = frozenset((
    "sort", "rng", "rng-bit-generator", "rng-get-and-update-state", "fft", "cholesky", "triangular-solve", "infeed",
    "outfeed", "send", "recv", "dynamic-reshape", "topk", "async-start",
))  # fmt: skip
# Custom calls that compute nothing: they allocate, name, and pair up halves.
BOOKKEEPING = frozenset((
    "AllocateBuffer", "AssumeGatherIndicesInBound", "AsyncCollectiveDone", "AsyncCollectiveStart", "ConcatBitcast",
    "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "X64Combine", "X64SplitHigh", "X64SplitLow",
))  # fmt: skip


def moved_bytes(module: Module, instruction: Instruction, computation: Computation) -> int:
    """Bytes read and written in the device's memory.

    Rows gathered and slices count twice, for being read and written. Rows scattered and slices updated do so by the
    size of the update, rows once more because they are added to. A fusion counts as what it has of these.
    """
    fused = module.fused(instruction)
    for inner in fused.instructions.values() if fused else (instruction,):
        where = fused or computation
        if inner.opcode in ("gather", "dynamic-slice", "slice"):
            return 2 * _bytes(inner)
        if inner.opcode in ("scatter", "dynamic-update-slice"):
            update = where.instructions[inner.operands[2 if inner.opcode == "scatter" else 1]]
            return (3 if inner.opcode == "scatter" else 2) * _bytes(update)
        if inner.opcode == "fusion" and where is fused and (found := moved_bytes(module, inner, where)):
            return found
    operands = (computation.instructions[name] for name in instruction.operands)
    return _bytes(instruction) + sum(map(_bytes, operands))


def _bytes(instruction: Instruction) -> int:
    return sum(array.num_bytes for array in instruction.arrays if array.in_hbm)
