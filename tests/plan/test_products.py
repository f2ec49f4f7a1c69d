"""FLOPs of products, against definitions evaluated element by element and against the FLOP counter."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from gemma_xla.flops import FlopCounter
from gemma_xla.model.config import preset
from gemma_xla.plan.hlo import parse
from gemma_xla.plan.loops import Frame, trips
from gemma_xla.plan.products import Product, _pairs, products

SAMPLES = Path(__file__).parent / "samples"


def convolution(left: str, right: str, result: str, labels: str, window: str = "") -> Product:
    window = f"window={{{window}}}, " if window else ""
    module = parse(
        f"ENTRY %main () -> {result} {{\n"
        f"  %a = {left} parameter(0)\n"
        f"  %b = {right} parameter(1)\n"
        f"  ROOT %c = {result} convolution(%a, %b), {window}dim_labels={labels}\n"
        "}\n"
    )
    (found,) = products(module, module.entry.root, module.entry)
    return found


# All of them printed by the compiler, for products of which rows, columns, shared size and batch are known.
@pytest.mark.parametrize(
    ("arguments", "rows", "columns", "shared", "batch"),
    [
        (("bf16[8192,2048]", "bf16[256,2048]", "bf16[8192,256]", "bf_oi->bf"), 8192, 256, 2048, 1),
        (("bf16[8192,16384]", "bf16[8192,2048]", "bf16[16384,2048]", "fb_io->bf"), 16384, 2048, 8192, 1),
        (("bf16[2,256,48]", "bf16[48,512,1]", "bf16[2,256,512]", "0bf_io0->0bf", "size=1"), 512, 512, 48, 1),
        # The window slides over padding: an outer product of one more dimension of the right matrix.
        (("bf16[8192,2048,1]", "bf16[8,256,2048]", "bf16[8192,8,256]", "bf0_0oi->b0f", "size=8 pad=7_7 rhs_reversal=1"),
         8192, 2048, 2048, 1),
        # A dimension that is summed over: rows of two sequences.
        (("bf16[2,256,512]", "bf16[2,256,48]", "bf16[512,48,1]", "0fb_0io->fb0", "size=2"), 512, 48, 512, 1),
        # Batches: a window as large as the batch, of which a dilated input leaves one element each.
        (("bf16[4,512,16]", "bf16[4,16,256]", "bf16[4,512,256]", "0bf_0io->0bf", "size=4 stride=3 lhs_dilate=4"),
         512, 256, 16, 4),
        (("bf16[4,256,16]", "bf16[4,512,256]", "bf16[4,512,16]", "0fb_0oi->0fb",
          "size=4 stride=4 pad=3_3 lhs_dilate=3 rhs_reversal=1"), 16, 512, 256, 4),
    ],
)  # fmt: skip
def test_products_of_the_compiler(arguments, rows, columns, shared, batch):
    product = convolution(*arguments)
    assert product.flops == 2 * rows * columns * shared * batch
    assert product.is_batched == (batch > 1)
    if batch == 1:
        assert sorted(product.dims) == sorted((rows, columns, shared))


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("low", [0, 2, -1])
def test_pairs_are_those_of_the_definition(length, low):
    options = itertools.product((1, 3, 4), (1, 2, 3), (1, 2, 4), (1, 2))
    for size, stride, lhs_dilate, rhs_dilate in options:
        positions = 7
        expected = 0
        for position, element in itertools.product(range(positions), range(size)):
            place = position * stride + element * rhs_dilate - low
            inside = 0 <= place <= (length - 1) * lhs_dilate
            expected += inside and place % lhs_dilate == 0
        names = {"size": size, "stride": stride, "lhs_dilate": lhs_dilate, "rhs_dilate": rhs_dilate}
        option = {name: str(value) for name, value in names.items()} | {"pad": f"{low}_0"}
        assert _pairs(length, positions, option) == expected, names


def test_dots():
    module = parse(
        "ENTRY %main () -> s32[2,8,32] {\n"
        "  %a = s8[2,8,16] parameter(0)\n"
        "  %b = s8[2,16,32] parameter(1)\n"
        "  ROOT %c = s32[2,8,32] dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, "
        "rhs_contracting_dims={1}\n}\n"
    )
    (product,) = products(module, module.entry.root, module.entry)
    assert product.flops == 2 * 2 * 8 * 16 * 32
    assert product.is_int8
    assert product.is_batched


def test_int8_takes_both_sides():
    sides = ("s8[8,16]", "s8[16,32]", "s32[8,32]", "bf_io->bf")
    assert convolution(*sides).is_int8
    assert not convolution("bf16[8,16]", *sides[1:]).is_int8


def total_flops(name: str) -> int:
    """FLOP of all products of a sample, as often as they run."""
    module = parse((SAMPLES / f"{name}.hlo").read_text())

    def walk(frame: Frame) -> int:
        total = 0
        for instruction in frame.computation.instructions.values():
            if instruction.opcode == "while":
                body = module.computations[instruction.find(r"body=%([\w.\-]+)")]
                total += trips(module, instruction, frame) * walk(Frame(body, instruction, frame))
            total += sum(p.flops for p in products(module, instruction, frame.computation))
        return total

    return walk(Frame(module.entry))


def test_a_compiled_training_step_has_the_flops_of_the_counter():
    # One sequence per chip. Layers run again in backward, all but the last projection, whose result nobody needs.
    counter = FlopCounter(preset("gemma-2b"), 8192)
    again = [t.forward for t in counter.terms(causal=False) if t.name not in ("down_proj", "lm_head")]
    assert total_flops("gemma_2b_v5p_4x4x4") == counter.per_sequence(causal=False) + sum(again)


def test_compiled_layers_have_the_flops_of_the_counter():
    # Two sequences per chip, forward only, without the head.
    terms = FlopCounter(preset("gemma-test"), 256).terms(causal=False)
    assert total_flops("layers_v5e_2x2") == 2 * sum(t.forward for t in terms if t.name != "lm_head")
