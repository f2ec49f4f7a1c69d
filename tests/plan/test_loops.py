"""Trip counts: of loops the TPU compiler printed and of loops written here; what cannot be known is an error."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemma_xla.plan.hlo import Module, parse
from gemma_xla.plan.loops import Frame, UnreadableLoopError, trips

SAMPLES = Path(__file__).parent / "samples"

LOOP = """
%wrapped (a: s32[], b: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %compare = pred[] compare(%a, %b), direction=DIRECTION
}
%condition (s: (s32[], f32[8])) -> pred[] {
  %s = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %limit = s32[] constant(LIMIT)
  ROOT %fusion = pred[] fusion(%i, %limit), kind=kLoop, calls=%wrapped
}
%body (s.1: (s32[], f32[8])) -> (s32[], f32[8]) {
  %s.1 = (s32[], f32[8]) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %x.1 = f32[8] get-tuple-element(%s.1), index=1
  %step = s32[] constant(STEP)
  %next = s32[] add(%i.1, %step)
  ROOT %t.1 = (s32[], f32[8]) tuple(%next, %x.1)
}
ENTRY %main (x: f32[8], n: s32[]) -> (s32[], f32[8]) {
  %x = f32[8] parameter(0)
  %n = s32[] parameter(1)
  %begin = s32[] constant(BEGIN)
  %copy = s32[] copy(%begin)
  %t = (s32[], f32[8]) tuple(%copy, %x)
  ROOT %while = (s32[], f32[8]) while(%t), condition=%condition, body=%body
}
"""


def loop(begin: int = 0, limit: int = 8, step: int = 1, direction: str = "LT") -> str:
    settings = {"BEGIN": begin, "LIMIT": limit, "STEP": step, "DIRECTION": direction}
    text = LOOP
    for name, value in settings.items():
        text = text.replace(name, str(value))
    return text


def count(text: str) -> dict[str, int]:
    """Trips of each loop, by name."""
    module = parse(text)
    return dict(_count(module, Frame(module.entry)))


def _count(module: Module, frame: Frame):
    for instruction in frame.computation.instructions.values():
        if instruction.opcode == "while":
            yield instruction.name, trips(module, instruction, frame)
            body = module.computations[instruction.find(r"body=%([\w.\-]+)")]
            yield from _count(module, Frame(body, instruction, frame))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 8),
        ({"begin": 3}, 5),
        ({"limit": 0}, 0),
        ({"direction": "LE"}, 9),
        ({"direction": "NE"}, 8),
        ({"step": 3}, 3),
        ({"begin": 7, "limit": 0, "step": -1, "direction": "GE"}, 8),
    ],
)
def test_counters(settings, expected):
    assert count(loop(**settings)) == {"while": expected}


def test_a_count_that_is_written_down_is_taken():
    text = loop().replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"11"}}')
    assert count(text) == {"while": 11}


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        # Two scans of jax, 3 and 5 long, one in the other.
        ("nested_loops", {"while.5": 3, "while.6": 5}),
        # PyTorch/XLA's scan counts in 64 bits, which the TPU splits in two.
        ("layers_v5e_2x2", {"while.10": 2}),
        ("gemma_2b_v5p_4x4x4", {"while.10": 18, "while.11": 18}),
    ],
)
def test_loops_of_compiled_programs(sample, expected):
    assert count((SAMPLES / f"{sample}.hlo").read_text()) == expected


def test_an_outer_loop_hands_constants_through():
    text = (SAMPLES / "nested_loops.hlo").read_text()
    # The inner counter begins with a part of the outer loop's state: a constant 0 that the outer loop does not change.
    part = text.replace("copy(%constant.14..sunk)", "copy(%get-tuple-element.131)")
    assert part != text
    assert count(part) == {"while.5": 3, "while.6": 5}
    # With the outer counter, which it does change, the inner count is not one number.
    with pytest.raises(UnreadableLoopError, match=r"while\.6"):
        count(text.replace("copy(%constant.14..sunk)", "copy(%get-tuple-element.121)"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("copy(%begin)", "copy(%n)", "the input n"),
        ("s32[] constant(1)", "s32[] sort(%i.1)", "a sort"),
        ("s32[] constant(1)", "s32[] constant(0)", "does not end"),
        ("tuple(%copy, %x)", "custom-call(%copy, %x)", "custom-call makes its state"),
    ],
)
def test_what_is_not_known_is_an_error(old, new, message):
    assert old in loop()
    with pytest.raises(UnreadableLoopError, match=message):
        count(loop().replace(old, new))
