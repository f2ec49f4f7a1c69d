"""Steps that stand out are found, on made-up curves and on real ones, and nothing else is."""

from __future__ import annotations

import math
import random

import pytest

from gemma_xla.train.metrics import read_metrics
from gemma_xla.train.spikes import ENOUGH, LATEST, WINDOW, note_spikes, outlier, spikes

THRESHOLD = 10.0


def curve(steps: int, seed: int, noise: float = 0.02, skew: float = 0.15) -> list[dict[str, float]]:
    """A loss that falls as a power of the step, and gradient norms of a log-normal distribution."""
    draw = random.Random(seed)
    return [
        {
            "step": step,
            "loss": (2.0 + 6.0 * step**-0.4) * math.exp(draw.gauss(0, noise)),
            "grad_norm": (0.3 + 4 * step**-0.5) * math.exp(draw.gauss(0, skew)),
        }
        for step in range(1, steps + 1)
    ]


def found(records: list[dict[str, float]], threshold: float = THRESHOLD) -> dict[int, dict[str, float]]:
    """The spikes of a curve, by step."""
    seen = {r["step"]: spikes(r, records[:i], threshold) for i, r in enumerate(records)}
    return {step: marks for step, marks in seen.items() if marks}


def test_deviations_are_those_of_a_normal_distribution():
    draw = random.Random(0)
    before = [math.exp(draw.gauss(1.0, 0.2)) for _ in range(20000)]
    before += [math.e] * LATEST
    assert outlier(math.exp(1.0 + 5 * 0.2), before) == pytest.approx(5.0, rel=0.03)
    assert outlier(math.exp(1.0 - 5 * 0.2), before) == pytest.approx(-5.0, rel=0.03)


def test_earlier_spikes_hardly_move_what_is_usual():
    draw = random.Random(1)
    calm = [math.exp(draw.gauss(0.0, 0.1)) for _ in range(WINDOW)]
    spoilt = [1e6 if i % 60 == 0 else figure for i, figure in enumerate(calm)]
    assert outlier(3.0, spoilt) > 0.75 * outlier(3.0, calm) > THRESHOLD * 0.75


def test_equal_figures_and_zero_are_no_division_by_zero():
    assert outlier(1.0, [1.0] * 9) == 0
    assert outlier(1.05, [1.0] * 9) == pytest.approx(100 * math.log(1.05))
    assert math.isfinite(outlier(0.0, [0.0] * 9)) and outlier(1.0, [0.0] * 9) > THRESHOLD


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("noise", [0.001, 0.02, 0.2])
def test_a_calm_curve_has_none(seed, noise):
    assert found(curve(1500, seed, noise)) == {}


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_a_spike_is_found_where_it_is(name):
    records = curve(600, 3)
    for step in (200, 450):
        records[step - 1][name] *= {"loss": 1.5, "grad_norm": 12}[name]
    marks = found(records)
    assert marks.keys() == {200, 450}
    assert all(mark.keys() == {f"{name}_spike"} and mark[f"{name}_spike"] > THRESHOLD for mark in marks.values())
    assert found(records, threshold=0) == {}


def test_a_fall_is_none_and_nor_is_anything_before_enough_is_known():
    records = curve(400, 4)
    records[300]["loss"] /= 3
    for early in (0, ENOUGH - 1):
        records[early]["loss"] *= 10
    assert found(records) == {}
    records[ENOUGH]["loss"] *= 10
    assert found(records).keys() == {ENOUGH + 1}


def test_a_new_level_is_soon_usual():
    records = curve(1200, 5)
    for record in records[600:]:
        record["loss"] *= 2
    steps = sorted(found(records))
    assert steps[0] == 601 and steps[-1] <= 601 + LATEST // 2


def test_a_real_run_has_none_until_one_is_put_in(finished_run):
    records = [r for r in read_metrics(finished_run / "metrics.jsonl") if "loss" in r]
    assert len(records) == 60 > ENOUGH
    assert found(records) == {}
    records[55] = records[55] | {"loss": 4 * records[55]["loss"]}
    assert found(records).keys() == {56}


def test_the_first_of_several_in_a_row_is_said(capsys):
    records, said = [], []
    for record in curve(300, 6):
        if 200 < record["step"] <= 210:
            record["loss"] *= 3
        rows = f"row 0: a.jsonl document {record['step']}\nrow 1: b.jsonl document 7"
        records.append({"step": record["step"], "eval_loss": 1.0})  # is none of theirs
        records.append(note_spikes(record, records, THRESHOLD, rows, said.append))
    assert [r["step"] for r in records if "loss_spike" in r] == list(range(201, 211))
    (line,) = said
    assert line.startswith("warning: step 201 stands out: loss ")
    assert "usually 2." in line and "deviations); its text: row 0: a.jsonl document 201; row 1: b.jsonl" in line
    assert "\n" not in line


def test_a_batch_of_many_documents_is_cut_short():
    records, said = curve(100, 7), []
    spoilt = records.pop() | {"loss": 50.0, "grad_norm": 900.0}
    note_spikes(spoilt, records, THRESHOLD, "row 0: " + "x, " * 5000, said.append)
    assert len(said[0]) < 1300 and said[0].endswith(" ...") and "; gradient norm 900, usually " in said[0]
