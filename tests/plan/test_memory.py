"""The compiler's account of memory, read right."""

from __future__ import annotations

from gemma_xla.plan.memory import memory_use

GIB = 2**30
DESCRIPTION = {
    "arguments": {
        "0": {"kind": "parameters", "shard_bytes": 1000},
        "1": {"kind": "optimizer", "shard_bytes": 2000},
        "3": {"kind": "batch", "shard_bytes": 64},
        "4": {"kind": "scalars", "shard_bytes": 4},
    }
}
# Shortened from what libtpu 0.0.21 said of a step of Gemma 2B.
TOO_MUCH = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. \
Used 17.50G of 15.75G hbm. Exceeded hbm capacity by 1.75G.

Total hbm usage >= 17.75G:
    reserved        258.12M
    program          17.50G
    arguments            0B

  Largest program allocations in hbm:

  1. Size: 1.95G
     Operator: op_name="aten__einsum" source_file="functional.py" source_line=373
     Shape: f32[256000,2048]{1,0:T(8,128)}
     Unpadded size: 1.95G
     XLA label: add_add_fusion = fusion(fusion.382, fusion.386), kind=kLoop
     Allocation type: HLO temp
     ==========================

  2. Size: 1000.00M
     Operator: op_name="aten__einsum"
     Shape: bf16[256000,2048]{1,0:T(8,128)(2,1)}
     XLA label: fusion.414.remat2 = fusion(copy.1)
     ==========================

  3. Size: 1000.00M
     Operator: op_name="aten__einsum"
     Shape: bf16[256000,2048]{1,0:T(8,128)(2,1)}
     XLA label: fusion.382 = fusion(copy.2)
     ==========================

  4. Size: 512B
     Shape: s32[128]{0}
     XLA label: copy.3 = copy(p)
"""


def test_the_worst_moment_and_the_program():
    compiled = {"memory": {"argument": 4096, "output": 3500, "alias": 3000, "generated_code": 700, "peak": 14596}}
    use = memory_use(compiled, DESCRIPTION, available=20000)
    assert (use.parameters, use.optimizer, use.gradients) == (1000, 2000, 0)
    # All else that is an argument, with what tiles add.
    assert use.batch == 4096 - 3000
    # New results are temporaries: 500 beside 10000.
    assert use.temporaries == 10500
    assert use.used == 4096 + 10500 + 700
    assert use.used == use.parameters + use.optimizer + use.batch + use.temporaries + use.program
    assert use.fits
    assert not memory_use(compiled, DESCRIPTION, available=use.used - 1).fits


def test_arguments_that_the_compiler_counts_are_not_counted_twice():
    account = TOO_MUCH.replace("arguments            0B", "arguments         1.50G")
    assert memory_use({"out_of_memory": account}, DESCRIPTION, available=1).temporaries == 16 * GIB


def test_the_account_of_too_much():
    use = memory_use({"out_of_memory": TOO_MUCH}, DESCRIPTION, available=round(15.75 * GIB))
    # The compiler leaves arguments out.
    assert use.used == round(17.5 * GIB) + 3068
    assert not use.fits
    assert [(b.num_bytes, b.shape, b.source) for b in use.largest] == [
        (round(1.95 * GIB), "f32[256000,2048]", "aten__einsum, fusion"),
        (1000 * 2**20, "bf16[256000,2048]", "aten__einsum, fusion (x 2)"),
        (512, "s32[128]", "copy"),
    ]
