"""What a plan prints, against figures worked out by hand."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from gemma_xla.errors import UserError
from gemma_xla.plan.report import BOUNDS, comparison, from_json, text, to_json
from gemma_xla.plan.result import Buffer, Collective, Estimate, Figures, HbmUse, Matmul, Plan
from gemma_xla.plan.units import count, gib

GIB, MIB = 2**30, 2**20
PRICE_SOURCE = "Google Cloud, on demand, us-east5; a catalogue, https://github.com/skypilot-org/skypilot-catalog"

MEMORY = HbmUse(
    available=int(15.75 * GIB),
    parameters=38 * MIB,
    optimizer=76 * MIB,
    gradients=0,
    batch=MIB,
    temporaries=6 * GIB,
    program=13 * MIB,
    used=6 * GIB + 128 * MIB,
)
ESTIMATE = Estimate(
    seconds=1.249,
    upper_bound_seconds=1.6,
    parts={"matmuls": 0.8, "attention": 0.3, "other": 0.1, "collectives": 0.049},
    collectives=[
        Collective("all-gather", "fsdp", 216, 20 * GIB, 0.35, True),
        Collective("all-reduce", "data+fsdp", 3, 3 * MIB, 0.049, False),
    ],
    matmuls=[
        Matmul(f"fusion.{i}", f"bf16[8192,{2048 + i}]", 18, 0.05 - i / 1000, 0.016, f"mlp/down_proj.{i}")
        for i in range(12)
    ],
    unpriced=["rng-bit-generator: 2"],
)
# 256 rows of 8192 tokens in 1.249 s on 256 chips; 138.0 TFLOP a row, causally; 6e12 tokens.
FIGURES = Figures(
    step_seconds=1.249,
    upper_bound_seconds=1.6,
    mfu=0.561,
    mfu_full_square=0.6213,
    tokens_per_second=8192 / 1.249,
    tokens_per_dollar=8192 / 1.249 * 3600 / 1.2,
    dollars_per_hour=256 * 1.2,
    price=1.2,
    price_source=PRICE_SOURCE,
    price_date="2026-11",
    tokens=6e12,
    days=6e12 / (256 * 8192 / 1.249) / 86400,
    dollars=6e12 / (8192 / 1.249 * 3600 / 1.2),
)
SETTINGS = {
    "seq_len": 8192,
    "batch_size_per_device": 1,
    "grad_accum": 1,
    "remat": "full",
    "layers": "scan",
    "attention": "splash",
    "compute_dtype": "bfloat16",
    "lora_rank": None,
}


def make_plan(**changes: Any) -> Plan:
    plan = Plan(
        config="gemma-2b-pretrain-v5e-256.yaml",
        topology="v5e-256",
        chip="v5e",
        num_chips=256,
        mesh={"data": 1, "fsdp": 256, "tensor": 1},
        settings=SETTINGS,
        rows=256,
        tokens_per_step=256 * 8192,
        compiled=True,
        memory=MEMORY,
        estimate=ESTIMATE,
        figures=FIGURES,
        advice=[],
        notes=["google/gemma-2b was taken to have the architecture of the preset gemma-2b " * 3],
        versions={"torch_xla": "2.9.0", "libtpu": "0.0.21"},
    )
    return dataclasses.replace(plan, **changes)


LARGEST = [Buffer(8 * GIB, "f32[8,8192,8192]{2,1,0}", "attention/scores"), Buffer(GIB, "f32[256000,1049]", "lm_head")]
TIGHT = make_plan(
    memory=dataclasses.replace(MEMORY, temporaries=20 * GIB, used=int(20.9 * GIB), largest=LARGEST),
    estimate=None,
    figures=None,
    advice=["train.remat=full: 14.20 GiB", "a larger slice"],
)
UNCOMPILED = make_plan(compiled=False, estimate=None)


def line_of(block: str, start: str) -> str:
    return next(line.strip() for line in block.splitlines() if line.strip().startswith(start))


def test_first_line_is_the_answer():
    assert text(make_plan()).splitlines()[0] == "fits: 6.12 of 15.75 GiB"
    assert text(TIGHT).splitlines()[0] == "does not fit: 20.90 of 15.75 GiB, 5.15 GiB too much"
    assert text(UNCOMPILED).splitlines()[0] == f"may fit: at least 6.12 of 15.75 GiB ({BOUNDS})"


def test_a_few_bytes_too_much_are_not_rounded_to_nothing():
    memory = dataclasses.replace(MEMORY, used=MEMORY.available + MIB)
    first = text(make_plan(memory=memory)).splitlines()[0]
    assert first == "does not fit: 15.75 of 15.75 GiB, 0.00098 GiB too much"


def test_speed_and_cost_by_hand():
    report = text(make_plan())
    # 8192 / 1.249 = 6558.8; x 3600 / 1.2 = 19.68 million; 6e12 / 19.68e6 = 304,932; / 307.2 / 24 = 41.4 days.
    assert line_of(report, "step") == "step               1.249 s ESTIMATE; upper bound 1.6 s (nothing overlaps)"
    assert line_of(report, "MFU").split(maxsplit=1)[1] == "56.1% causal, 62.1% full-square"
    assert "EMFU" not in report
    in_8_bits = text(make_plan(settings={**SETTINGS, "precision": "int8"}))
    assert line_of(in_8_bits, "EMFU").split(maxsplit=1)[1] == "56.1% causal, 62.1% full-square"
    assert line_of(report, "tokens/s/chip").split()[1] == "6,559"
    assert line_of(report, "tokens per dollar").endswith("19.68 million")
    assert line_of(report, "dollars per hour").endswith("307.20 (256 x 1.20)")
    assert line_of(report, "6 trillion tokens").endswith("41.4 days, 304,932 dollars")
    assert line_of(report, "Price list of 2026-11").endswith("catalogue,")


def test_memory_lines_and_bars_by_hand():
    report = text(make_plan())
    # 6144 of 16128 MiB is 38.1%, or 15 of 40 marks; free are 9856 MiB, 61.1%, 24 marks.
    assert line_of(report, "temporaries").split() == ["temporaries", "6.00", "GiB", "38.1%", "#" * 15]
    assert line_of(report, "free").split() == ["free", "9.62", "GiB", "61.1%", "." * 24]
    assert "add up to" not in report
    # 7168 - 6272 MiB.
    padded = text(make_plan(memory=dataclasses.replace(MEMORY, used=7 * GIB)))
    assert line_of(padded, "other ").split()[:3] == ["other", "0.88", "GiB"]
    shared = text(make_plan(memory=dataclasses.replace(MEMORY, used=5 * GIB)))
    assert "The parts add up to 6.12 GiB; laid out, they take 5.00 GiB." in shared
    # 5.15 of 20.9 GiB, 10 of 40 marks.
    assert line_of(text(TIGHT), "too much").split()[2:] == ["5.15", "GiB", "32.7%", "!" * 10]


def test_where_the_time_goes_and_traffic():
    report = text(make_plan())
    assert line_of(report, "matmuls ").split() == ["matmuls", "0.8", "s", "64.1%", "#" * 26]
    assert line_of(report, "collectives").split()[:4] == ["collectives", "49", "ms", "3.9%"]
    assert line_of(report, "all-gather").split() == ["all-gather", "fsdp", "216", "20.00", "GiB", "0.35", "s", "yes"]
    assert line_of(report, "all-reduce").split() == ["all-reduce", "data+fsdp", "3", "3.00", "MiB", "49", "ms", "no"]


def test_ten_matmuls_and_no_more():
    report = text(make_plan())
    row = line_of(report, "50 ms").split()
    assert row == ["50", "ms", "16", "ms", "32%", "18", "bf16[8192,2048]", "mlp/down_proj.0"]
    assert "mlp/down_proj.9" in report
    assert "mlp/down_proj.10" not in report
    assert "(10 of 12)" in report


def test_what_does_not_fit_says_why_and_what_to_do():
    report = text(TIGHT)
    assert "no step time: it does not fit" in report
    assert line_of(report, "8.00 GiB").split() == ["8.00", "GiB", "f32[8,8192,8192]{2,1,0}", "attention/scores"]
    assert report.index("train.remat=full") < report.index("a larger slice")
    assert "largest temporaries" not in text(make_plan())


def test_arithmetic_is_never_called_an_estimate():
    report = text(UNCOMPILED)
    assert "ESTIMATE" not in report
    assert "upper bound" not in report
    assert report.count(BOUNDS) == 3
    assert line_of(report, "step").endswith("at least 1.249 s")
    assert line_of(report, "MFU").endswith("at most 56.1% causal, at most 62.1% full-square")


def test_unpriced_operations_and_notes_come_last():
    report = text(make_plan())
    assert report.index("down_proj") < report.index("rng-bit-generator: 2") < report.index("was taken to have")
    assert report.splitlines()[-1] == "with torch_xla 2.9.0, libtpu 0.0.21"


def test_plain_ascii_of_100_columns_whatever_is_in_it():
    wide = Matmul("f", "(" + "bf16[8192,2048], " * 20 + ")", 1, 0.1, 0.0, "a\nvery/long/sourcé" * 20)
    estimate = dataclasses.replace(ESTIMATE, matmuls=[wide])
    for plan in (make_plan(config="ü" * 130, estimate=estimate), TIGHT, UNCOMPILED):
        for block in (text(plan), comparison([plan, TIGHT])):
            assert block.isascii()
            assert max(map(len, block.splitlines())) <= 100


@pytest.mark.parametrize("plan", [make_plan(), TIGHT, UNCOMPILED])
def test_json_round_trip(plan):
    assert from_json(json.loads(json.dumps(to_json(plan)))) == plan


def test_json_keys_are_stable():
    data = to_json(make_plan())
    assert data["schema_version"] == 1
    assert data["fits"] is True
    assert {"memory", "num_bytes", "tokens_per_second"} <= set(data["units"])
    fields = ["config", "topology", "chip", "num_chips", "mesh", "settings", "rows", "tokens_per_step", "compiled"]
    fields += ["memory", "estimate", "figures", "advice", "notes", "versions"]
    assert list(data) == ["schema_version", "units", "fits", *fields]


@pytest.mark.parametrize(
    "damage",
    [
        {"schema_version": 2},
        {"memory": {}},
        {"estimate": {"seconds": 1.0}},
        {"figures": {"days": 1.0}},
        {"memory": None},
    ],
)
def test_json_of_something_else_is_refused(damage):
    with pytest.raises(UserError, match="plan anew"):
        from_json({**to_json(make_plan()), **damage})
    with pytest.raises(UserError, match="versions"):
        from_json({k: v for k, v in to_json(make_plan()).items() if k != "versions"})


def test_comparison_marks_the_best_value_and_what_is_missing():
    dear = dataclasses.replace(FIGURES, tokens_per_dollar=19e6, step_seconds=1.0)
    plans = [TIGHT, make_plan(topology="v5p-128", figures=dear), make_plan(topology="v6e-256")]
    lines = [line.split() for line in comparison(plans).splitlines()]
    assert lines[1] == ["v5e-256", "256", "20.90/15.75", "5.15", "over", *["-"] * 6]
    speed = ["0.561", "6,559", "19M", "41.4", "304,932"]
    assert lines[2] == ["v5p-128", "256", "6.12/15.75", "yes", "1.000", *speed]
    speed = ["0.561", "6,559", "19.68M", "41.4", "304,932"]
    assert lines[3] == ["*", "v6e-256", "256", "6.12/15.75", "yes", "1.249", *speed]
    assert "6 trillion tokens" in comparison(plans)
    assert "batch_size_per_device" not in comparison(plans)


def test_comparison_prefers_an_estimate_to_a_bound():
    bound = make_plan(compiled=False, estimate=None, figures=dataclasses.replace(FIGURES, tokens_per_dollar=1e9))
    lines = comparison([dataclasses.replace(bound, topology="v6e-256"), make_plan()]).splitlines()
    assert lines[1].split()[:5] == ["~", "v6e-256", "256", "6.12/15.75", "maybe"]
    assert lines[2].split()[0] == "*"
    assert comparison([bound]).splitlines()[1].split()[0] == "*~"
    assert BOUNDS in comparison([bound])
    assert "ESTIMATE" not in comparison([bound])


def test_comparison_names_slices_whose_time_leaves_something_out():
    whole = make_plan(topology="v5p-128", estimate=dataclasses.replace(make_plan().estimate, unpriced=[]))
    text = comparison([whole, make_plan(topology="v6e-256")])
    (note,) = [line for line in text.splitlines() if "no price" in line]
    assert note.endswith(": v6e-256")
    assert "no price" not in comparison([whole])


def test_comparison_tells_settings_of_one_slice_apart():
    other = make_plan(settings={**SETTINGS, "batch_size_per_device": 2, "remat": "names"})
    lines = comparison([make_plan(), other]).splitlines()
    assert lines[2].strip() == "batch_size_per_device 1, remat full"
    assert lines[4].strip() == "batch_size_per_device 2, remat names"


@pytest.mark.parametrize(
    ("number", "long", "short"),
    [
        (6e12, "6 trillion", "6T"),
        (19.684e6, "19.68 million", "19.68M"),
        (2.5e9, "2.5 billion", "2.5B"),
        (950, "950", "950"),
    ],
)
def test_counts(number, long, short):
    assert count(number) == long
    assert count(number, short=True) == short


@pytest.mark.parametrize(("num_bytes", "shown"), [(GIB, "1.00"), (0, "0.00"), (MIB, "0.00098"), (6 * MIB, "0.01")])
def test_gib(num_bytes, shown):
    assert gib(num_bytes) == shown
