"""The estimate, on programs written here, whose time is added up by hand, and on what the TPU compiler printed."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from gemma_xla.chips import CHIPS
from gemma_xla.plan.estimate import estimate
from gemma_xla.plan.loops import UnreadableLoopError
from gemma_xla.plan.result import Estimate
from gemma_xla.sharding import MeshShape

SAMPLES = Path(__file__).parent / "samples"
V5E = CHIPS["v5e"]


def cycles(number: int) -> str:
    return f', backend_config={{"window_config":{{"estimated_cycles":"{number}"}}}}'


def run(*lines: str, computations: str = "", mesh: MeshShape | None = None) -> Estimate:
    body = "\n".join(f"  {line}" for line in lines)
    text = f"{computations}\nENTRY %main () -> f32[] {{\n{body}\n}}\n"
    return estimate(text, V5E, mesh or MeshShape(1, 4))


def sample(name: str, chip: str, mesh: MeshShape) -> Estimate:
    return estimate((SAMPLES / f"{name}.hlo").read_text(), CHIPS[chip], mesh)


def check_sums(found: Estimate) -> None:
    assert sum(found.parts.values()) == pytest.approx(found.seconds)
    assert found.seconds <= found.upper_bound_seconds * (1 + 1e-12)
    assert found.seconds >= sum(one.seconds for one in found.collectives) * (1 - 1e-12)


SUM = """
%multiply (a: bf16[64,32], b: bf16[32,16]) -> bf16[64,16] {
  %a = bf16[64,32] parameter(0)
  %b = bf16[32,16] parameter(1)
  ROOT %c = bf16[64,16] convolution(%a, %b), dim_labels=bf_io->bf, metadata={op_name="step/aot_backward/aten__mm" \
source_file="/somewhere/gemma_xla/model/loss.py"}
}
"""


def test_cycles_become_seconds_by_part():
    found = run(
        "%x = bf16[64,16] fusion(), kind=kOutput, calls=%multiply" + cycles(3000),
        "%y = f32[8] copy()" + cycles(1500),
        "%z = f32[] add()",
        computations=SUM,
    )
    assert found.parts == pytest.approx({"matmuls": 2e-6, "attention": 0, "other": 1e-6, "collectives": 0}, rel=1e-4)
    assert found.seconds == found.upper_bound_seconds == pytest.approx(3e-6, rel=1e-4)
    (matmul,) = found.matmuls
    assert (matmul.name, matmul.shape, matmul.count) == ("x", "bf16[64,16]", 1)
    assert matmul.source == "aot_backward/aten__mm (model/loss.py)"
    assert matmul.seconds == pytest.approx(2e-6)
    assert matmul.ideal_seconds == pytest.approx(2 * 64 * 32 * 16 / 197e12)
    assert found.unpriced == []


def test_int8_has_a_peak_of_its_own():
    eight = SUM.replace("bf16", "s8")
    found = run("%x = s8[64,16] fusion(), kind=kOutput, calls=%multiply" + cycles(3), computations=eight)
    assert found.matmuls[0].ideal_seconds == pytest.approx(2 * 64 * 32 * 16 / 393e12)


def test_what_loses_most_comes_first():
    found = run(
        *(f"%x.{n} = bf16[64,16] fusion(), kind=kOutput, calls=%multiply" + cycles(n) for n in (2000, 9000, 5000)),
        computations=SUM,
    )
    assert [matmul.name for matmul in found.matmuls] == ["x.9000", "x.5000", "x.2000"]


def test_loops_multiply_and_nest():
    found = sample("nested_loops", "v5e", MeshShape(16))
    # 3 x 5 times a product of 14100 cycles and a copy of 4076; before them, 256 x 1024 bf16 are read from memory.
    assert found.parts["matmuls"] == pytest.approx(15 * 14100 / 1.5e9)
    assert found.parts["other"] == pytest.approx(15 * 4076 / 1.5e9 + 2 * 256 * 1024 / 819e9, rel=1e-3)
    (matmul,) = found.matmuls
    assert matmul.count == 15
    assert matmul.ideal_seconds == pytest.approx(15 * 2 * 256 * 1024 * 1024 / 197e12)


def test_a_loop_without_a_known_count_is_an_error():
    text = (SAMPLES / "nested_loops.hlo").read_text().replace("constant(5)", "rng()")
    with pytest.raises(UnreadableLoopError, match=r"while\.6"):
        estimate(text, V5E, MeshShape(16))


def test_the_longest_branch_counts():
    branches = "".join(f"%{n} () -> f32[8] {{\n  ROOT %c{n} = f32[8] copy(){cycles(c)}\n}}\n"
                       for n, c in (("short", 1500), ("long", 4500), ("middle", 3000)))  # fmt: skip
    found = run("%p = f32[8] conditional(), branch_computations={%short, %long, %middle}", computations=branches)
    assert found.seconds == pytest.approx(3e-6)
    found = run("%p = f32[8] conditional(), true_computation=%short, false_computation=%middle", computations=branches)
    assert found.seconds == pytest.approx(2e-6)
    found = run("%p = f32[8] call(), to_apply=%middle", "%q = f32[8] call(), to_apply=%middle", computations=branches)
    assert found.seconds == pytest.approx(4e-6)


GATHER = ", channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}"
# 4 x 90 MB over two links of 45 GB/s, 3/4 of it from others.
WHOLE, SECONDS = 360_000_000, 0.36 * 0.75 / 90


def test_synchronous_collectives_add_up():
    found = run("%w = s8[90000000] parameter(0)", f"%g = s8[360000000] all-gather(%w){GATHER}",
                f"%h = s8[360000000] all-gather(%w){GATHER}", "%x = f32[8] copy()" + cycles(1_500_000))  # fmt: skip
    assert found.parts["collectives"] == pytest.approx(2 * SECONDS)
    assert found.seconds == found.upper_bound_seconds == pytest.approx(0.001 + 2 * SECONDS)
    (gathers,) = found.collectives
    assert (gathers.kind, gathers.axis, gathers.count) == ("all-gather", "fsdp", 2)
    assert (gathers.num_bytes, gathers.overlaps) == (2 * WHOLE, False)
    check_sums(found)


@pytest.mark.parametrize(("computing", "waiting"), [(0.004, 0.0), (0.001, SECONDS - 0.001)])
def test_asynchronous_collectives_hide_behind_computation(computing, waiting):
    found = run("%w = s8[90000000] parameter(0)", f"%s = (s8[90000000], s8[360000000]) all-gather-start(%w){GATHER}",
                "%x = f32[8] copy()" + cycles(round(computing * 1.5e9)),
                "%d = s8[360000000] all-gather-done(%s)")  # fmt: skip
    assert found.seconds == pytest.approx(computing + waiting)
    assert found.parts.get("waiting", 0) == pytest.approx(waiting)
    assert found.parts["collectives"] == 0
    assert found.upper_bound_seconds == pytest.approx(computing + SECONDS)
    assert [(one.count, one.num_bytes, one.overlaps) for one in found.collectives] == [(1, WHOLE, True)]
    check_sums(found)


def test_a_loop_hides_only_behind_itself():
    # Computation around a loop does not help the transfers in it.
    loop = (SAMPLES / "nested_loops.hlo").read_text()
    start = f"  %s = (s8[90000000], s8[360000000]) all-gather-start(%w){GATHER}"
    text = loop.replace("  %add.5 = ", f"  %w = s8[90000000] parameter(1)\n{start}\n  %add.5 = ")
    outside = text.replace("  %copy.9 = ", f"  %busy = f32[8] copy(){cycles(10**9)}\n  %copy.9 = ")
    found, more = (estimate(t, V5E, MeshShape(1, 16)) for t in (text, outside))
    assert found.collectives[0].count == 15
    assert found.parts["waiting"] == pytest.approx(found.collectives[0].seconds - 15 * (14100 + 4076) / 1.5e9)
    assert more.seconds == pytest.approx(found.seconds + 10**9 / 1.5e9)


def test_a_collective_worked_off_beside_products_counts_once():
    found = sample("layers_v5e_2x2", "v5e", MeshShape(1, 4))
    # By hand: per layer, four weights are gathered beside products, in a start, pieces and an end; three at once.
    sizes = {"q, o, gate, up": 2 * (64 * 48 + 48 * 64 + 2 * 96 * 48), "k, v, down": 2 * (2 * 32 * 48 + 48 * 96)}
    (beside, once) = sorted(found.collectives, key=lambda one: not one.overlaps)
    assert beside.overlaps
    assert not once.overlaps
    assert (beside.count, once.count) == (8, 6)
    assert beside.num_bytes + once.num_bytes == 2 * sum(sizes.values())
    check_sums(found)


def test_layers_split_into_attention_and_the_rest():
    found = sample("layers_v5e_2x2", "v5e", MeshShape(1, 4))
    batched = [m for m in found.matmuls if "aten__matmul" in m.source]
    assert len(batched) == 2
    assert len(found.matmuls) == 8
    linear = sum(m.seconds for m in found.matmuls) - sum(m.seconds for m in batched)
    assert found.parts["matmuls"] == pytest.approx(linear)
    # And more than the two products: masks and softmax.
    assert found.parts["attention"] > sum(m.seconds for m in batched)


def test_batched_products_are_attention_by_any_name():
    text = (SAMPLES / "layers_v5e_2x2.hlo").read_text()
    found = [estimate(t, V5E, MeshShape(1, 4)) for t in (text, text.replace("aten__matmul", "aten__mm"))]
    assert found[0].parts == found[1].parts


def test_attention_is_told_without_names():
    found = sample("gemma_2b_v5p_4x4x4", "v5p", MeshShape(1, 64))
    square = 2 * 8 * 8192 * 8192 * 256 / 459e12
    attention = [m for m in found.matmuls if m.ideal_seconds == pytest.approx(18 * square)]
    # Scores and values, again in backward, and two products for the gradients of each.
    assert len(attention) == 8
    assert found.parts["attention"] == pytest.approx(sum(m.seconds for m in attention))
    assert len(found.matmuls) == 83
    check_sums(found)


def test_a_compiled_layer_on_a_slice():
    found = sample("fsdp_v5e_4x4", "v5e", MeshShape(4, 4))
    size = 2 * 4096 * 8192
    prices = {(one.kind, one.axis): (one.num_bytes, one.seconds) for one in found.collectives}
    # Gathered along a line of 4; reduced over the square, along two lines at a time.
    assert prices["all-gather", "fsdp"] == (size, pytest.approx(size * 3 / 4 / 45e9))
    assert prices["all-reduce", "data+fsdp"] == (size, pytest.approx(2 * size * 15 / 16 / 90e9))
    assert found.parts["matmuls"] == pytest.approx((536412 + 547073) / 1.5e9)
    check_sums(found)


SCATTER = """
%all-reduce-scatter.2 (x: f32[64,8]) -> f32[16,8] {
  %x = f32[64,8] parameter(0)
  %zero = s32[] constant(0)
  %sum = f32[64,8] all-reduce(%x), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %part = f32[16,8] dynamic-slice(%sum, %zero, %zero), dynamic_slice_sizes={16,8}
}
"""


def test_an_all_reduce_of_which_each_keeps_its_part_is_a_reduce_scatter():
    found = run(
        "%x = f32[64,8] parameter(0)",
        "%y = f32[16,8] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.2",
        computations=SCATTER,
    )
    (one,) = found.collectives
    assert (one.kind, one.axis, one.num_bytes, one.overlaps) == ("reduce-scatter", "fsdp", 4 * 64 * 8, False)
    whole = run("%x = f32[64,8] parameter(0)", "%y = f32[64,8] all-reduce(%x), replica_groups={{0,1,2,3}}")
    assert one.seconds == pytest.approx(whole.collectives[0].seconds / 2)


@pytest.mark.parametrize(
    ("line", "moved"),
    [
        ("%y = f32[100,10] concatenate(%x, %x)", 4000 + 2 * 4000),
        ("%y = f32[100,10]{1,0:S(1)} copy(%x)", 4000),
        ("%y = f32[100,10] dynamic-update-slice(%x, %row, %i)", 2 * 40),
        ("%y = f32[5,10] gather(%x, %i)", 2 * 200),
        ("%y = f32[100,10] scatter(%x, %i, %row)", 3 * 40),
        ("%y = f32[1,10] slice(%x)", 2 * 40),
        ("%y = f32[100,10] fusion(%x, %i, %row), kind=kCustom, calls=%scattering", 3 * 40),
        ("%y = (f32[100,10], f32[100,10], u32[]) copy-start(%x)", 0),
        ("%y = f32[100,10] bitcast(%x)", 0),
        ('%y = f32[100,10] custom-call(), custom_call_target="AllocateBuffer"', 0),
    ],
)
def test_what_has_no_cycles_costs_its_bytes(line, moved):
    inputs = ("%x = f32[100,10] parameter(0)", "%i = s32[1] parameter(1)", "%row = f32[1,10] parameter(2)")
    lines = "\n  ".join((*inputs, "ROOT %s = f32[100,10] scatter(%x, %i, %row)"))
    found = run(*inputs, line, computations=f"%scattering () -> f32[100,10] {{\n  {lines}\n}}\n")
    assert found.seconds == pytest.approx(moved / 819e9)
    assert found.unpriced == []


def test_what_has_no_price_is_listed():
    found = run(
        "%a = f32[8] sort()",
        "%b = f32[8] sort()",
        '%c = f32[8] custom-call(), custom_call_target="Surprise"',
        '%kernel.12 = f32[8] custom-call(), custom_call_target="tpu_custom_call"',
    )
    assert found.unpriced == ["Surprise: 1", "kernel: 1", "sort: 2"]
    assert found.seconds == 0


@pytest.mark.parametrize("said", ["", ', backend_config={"estimated_cycles":"9223372036854775807"}'])
def test_products_that_the_compiler_does_not_price_count_at_the_peak(said):
    found = run("%x = bf16[64,16] fusion(), kind=kOutput, calls=%multiply" + said, computations=SUM)
    assert found.unpriced == ["fusion with products, counted at the chip's peak: 1"]
    assert found.seconds == pytest.approx(found.matmuls[0].ideal_seconds) != 0


FORWARD = (
    "splash_mqa_fwd_residuals_block_kv_1024_block_kv_compute_512_block_kv_dkv_1024_block_q_1024_block_q_dkv_1024.2"
)


def kernel(name: str = FORWARD, results: int = 5, keys: str = "bf16[8192,256]", heads: str = "8") -> tuple[str, ...]:
    shape = ", ".join(["f32[1024,128]"] * results)
    return ("%m = s8[1,8,8] constant({...})", f"%q = bf16[{heads},8192,256] parameter(0)", f"%k = {keys} parameter(1)",
            f'%{name} = ({shape}) custom-call(%m, %m, %q, %k, %k), custom_call_target="tpu_custom_call"')  # fmt: skip


def test_splash_attention_has_a_price():
    # 8 heads, 36 of 64 blocks.
    found = run(*kernel())
    assert found.parts["attention"] == found.seconds == pytest.approx(8 * 36 * 9049 / 1.5e9)
    assert found.unpriced == []
    assert run(*kernel(heads="3,8")).seconds == pytest.approx(3 * found.seconds)
    segmented = f"vmap_vmap_{FORWARD}".replace("fwd", "fwd_segmented")
    assert run(*kernel(name=segmented)).seconds == pytest.approx(8 * 36 * 9094 / 1.5e9)


@pytest.mark.parametrize(("heads", "cores"), [("8", 1), ("3,8", 1), ("2,4", 2), ("3,2,4", 2)])
def test_two_cores_share_what_is_independent(heads, cores):
    name = "vmap_splash_mqa_dq_segmented_block_kv_dq_1024_block_q_dq_1024_k.2"
    lines = "\n  ".join(kernel(name=name, results=2, heads=heads))
    found = estimate(f"ENTRY %main () -> f32[] {{\n  {lines}\n}}\n", CHIPS["v5p"], MeshShape(1, 4))
    one_head = 36 * 12696 / 1.75e9
    assert found.seconds == pytest.approx(math.prod(map(int, heads.split(","))) * one_head / cores)


@pytest.mark.parametrize(
    ("chip", "heads", "blocks", "cycles_each", "cores"),
    [
        ("v5e", "8", 36, 21780, 1),
        ("v5e", "1,1,8", 15, 21780, 1),
        ("v5p", "1,2,4", 36, 22250, 2),
        ("v5p", "1,8", 36, 22250, 1),
    ],
)
def test_the_kernel_of_gradients_has_a_price(chip, heads, blocks, cycles_each, cores):
    # As many blocks as its tables name: fewer with a window.
    lines = (
        f"%t = s32[{blocks}] parameter(0)",
        f"%q = bf16[{heads},8192,256] parameter(1)",
        "%vmap_flash_backward_segmented_1024_512__.7 = (bf16[8,8192,256], bf16[8192,256], bf16[8192,256]) "
        'custom-call(%t, %t, %t, %t, %t, %q), custom_call_target="tpu_custom_call"',
    )
    text = "\n  ".join(lines)
    found = estimate(f"ENTRY %main () -> f32[] {{\n  {text}\n}}\n", CHIPS[chip], MeshShape(1, 4))
    expected = 8 * blocks * cycles_each / cores / CHIPS[chip].clock.value
    assert found.parts["attention"] == found.seconds == pytest.approx(expected)
    other = estimate(
        f"ENTRY %main () -> f32[] {{\n  {text.replace('256]', '128]')}\n}}\n", CHIPS[chip], MeshShape(1, 4)
    )
    assert other.unpriced == ["vmap_flash_backward_segmented_1024_512__: 1"]


@pytest.mark.parametrize(
    ("chip", "name", "expected"),
    [
        ("v5e", "heads_first_1024_", 2 * 8 * 8192 * 512 / (0.81 * 819e9)),
        ("v5e", "vmap_heads_last_turned_1024_.3", (2 * 8 * 8192 * 512 + 2 * 8192 * 512) / (0.81 * 819e9)),
        ("v5p", "vmap_heads_first_turned_1024_.3", (2 * 8 * 8192 * 512 + 2 * 8192 * 512) / (0.72 * 2765e9)),
        # Memory that is faster than the two cores.
        ("fast v5p", "heads_first_turned_1024_", 8 * 8 * 921 / 2 / 1.75e9),
    ],
)
def test_moving_heads_has_a_price(chip, name, expected):
    tables = ", %t, %t" if "turned" in name else ""
    of = CHIPS[chip.removeprefix("fast ")]
    if chip.startswith("fast"):
        of = dataclasses.replace(of, hbm_bandwidth=dataclasses.replace(of.hbm_bandwidth, value=1e15))
    text = f"""%t = f32[1,8192,128] parameter(0)
  %x = bf16[1,8192,2048] parameter(1)
  %{name} = bf16[8,8192,256] custom-call(%x{tables}), custom_call_target="tpu_custom_call\""""
    found = estimate(f"ENTRY %main () -> f32[] {{\n  {text}\n}}\n", of, MeshShape(1, 4))
    assert found.seconds == pytest.approx(expected)
    assert found.unpriced == []


def test_a_kernel_beside_a_collective_is_still_paid_for():
    inside = "\n  ".join(kernel())
    computations = f"%beside () -> f32[8] {{\n  {inside}\n  ROOT %z = f32[8] add()\n}}\n"
    found = run("%y = f32[8] fusion(), kind=kCustom, calls=%beside" + cycles(1500), computations=computations)
    assert found.parts["attention"] == pytest.approx(8 * 36 * 9049 / 1.5e9)
    assert found.parts["other"] == pytest.approx(1e-6)


@pytest.mark.parametrize(
    "changed",
    [
        kernel(name=FORWARD.replace("compute_512", "compute_1024")),
        kernel(name="splash_mqa_dkv_block_kv_dkv_1024_block_kv_dkv_compute_512_block_q_dkv_1024_k.2", results=6),
        kernel(keys="bf16[4096,256]"),
        tuple(line.replace("256]", "128]") for line in kernel()),
    ],
)
def test_kernels_that_were_not_measured_have_none(changed):
    found = run(*changed)
    assert found.seconds == 0
    assert len(found.unpriced) == 1
    assert found.unpriced[0].startswith("splash_mqa_")


def test_only_tpus_can_be_estimated():
    with pytest.raises(ValueError, match="h100 is not a TPU"):
        estimate("ENTRY %main () -> f32[] {\n  ROOT %x = f32[] constant(0)\n}\n", CHIPS["h100"], MeshShape())
