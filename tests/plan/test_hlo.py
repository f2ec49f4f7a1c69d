"""The reader of HLO, on lines written here and on what the TPU compiler printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemma_xla.plan.hlo import Array, arrays, parse

SAMPLES = Path(__file__).parent / "samples"

MODULE = """HloModule jit_f, is_scheduled=true, entry_computation_layout={(bf16[8,16]{1,0})->bf16[8,16]{1,0}}

%inner (p: bf16[8,16]) -> (bf16[8,16], /*index=1*/s32[]) {
  %p = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %c.1 = s32[]{:T(128)} constant(-3)
  ROOT %t = (bf16[8,16]{1,0:T(8,128)(2,1)}, /*index=1*/s32[]) tuple(%p, %c.1)
}

ENTRY %main.7_spmd (x: bf16[8,16]) -> bf16[8,16] {
  %x = bf16[8,16]{1,0} parameter(0), metadata={op_name="a (b"}
  %fusion.2 = (bf16[8,16]{1,0}, s32[]) fusion(%x), kind=kLoop, calls=%inner, metadata={op_name="scan/aten__mm" \
source_file="gemma_xla/model/layers.py" source_line=3}, backend_config={"window_config":{"estimated_cycles":"1840"}}
  %branch = bf16[8,16]{1,0} conditional(%x), branch_computations={%inner, %inner}
  ROOT %get-tuple-element.1 = bf16[8,16]{1,0} get-tuple-element(%fusion.2), index=0
}
"""


def test_computations_and_instructions():
    module = parse(MODULE)
    assert list(module.computations) == ["inner", "main.7_spmd"]
    assert module.entry.name == "main.7_spmd"
    assert list(module.entry.instructions) == ["x", "fusion.2", "branch", "get-tuple-element.1"]
    assert module.entry.root is module.entry.instructions["get-tuple-element.1"]
    inner = module.computations["inner"]
    assert inner.root.name == "t"
    assert inner.root.operands == ["p", "c.1"]
    assert inner.instructions["c.1"].argument == "-3"


def test_what_an_instruction_tells():
    module = parse(MODULE)
    fusion = module.entry.instructions["fusion.2"]
    assert (fusion.opcode, fusion.operands, fusion.called) == ("fusion", ["x"], "inner")
    assert fusion.shape == "(bf16[8,16]{1,0}, s32[])"
    assert fusion.estimated_cycles == 1840
    assert fusion.op_name == "scan/aten__mm"
    assert fusion.source_file == "gemma_xla/model/layers.py"
    assert module.fused(fusion) is module.computations["inner"]
    assert module.entry.taken(fusion) == [Array("bf16", (8, 16), True)]
    x = module.entry.instructions["x"]
    assert (x.estimated_cycles, x.op_name, x.source_file, x.called) == (None, "a (b", "", None)
    assert module.entry.instructions["branch"].branches == ["inner", "inner"]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("f32[]", [("f32", (), True, 4)]),
        ("bf16[8,128]{1,0:T(8,128)(2,1)S(1)}", [("bf16", (8, 128), False, 2048)]),
        ("s32[1,8192]{1,0:T(1,128)S(1)SC(1:4096)}", [("s32", (1, 8192), False, 32768)]),
        ("u32[]{:S(2)}", [("u32", (), False, 4)]),
        ("s4[3]{0}", [("s4", (3,), True, 2)]),
        ("(pred[5]{0}, f8e5m2[2,2]{1,0}, /*index=2*/s64[0])", [
            ("pred", (5,), True, 5), ("f8e5m2", (2, 2), True, 4), ("s64", (0,), True, 0),
        ]),
        ("token[]", [("token", (), True, 0)]),
    ],
)  # fmt: skip
def test_shapes(shape, expected):
    assert [(a.dtype, a.dims, a.in_hbm, a.num_bytes) for a in arrays(shape)] == expected


@pytest.mark.parametrize("name", [path.name for path in SAMPLES.glob("*.hlo")])
def test_every_line_of_a_compiled_program_is_read(name):
    text = (SAMPLES / name).read_text()
    module = parse(text)
    found = [i for c in module.computations.values() for i in c.instructions.values()]
    assert len(found) == sum(line.startswith("  ") for line in text.splitlines())


def test_other_texts_are_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("error: RESOURCE_EXHAUSTED")
    with pytest.raises(ValueError, match="cut off"):
        parse(MODULE.replace("tuple(%p, %c.1)", "tuple(%p, %c.1"))
