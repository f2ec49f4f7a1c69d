"""Figures of a step, the files they go to, what a run is summed up as, and who is told of a compilation."""

from __future__ import annotations

import json
import statistics
import warnings
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from gemma_xla.backend import Backend
from gemma_xla.chips import CHIPS
from gemma_xla.flops import FlopCounter
from gemma_xla.model.config import preset
from gemma_xla.train.compilations import CompilationWatch
from gemma_xla.train.metrics import Meter, MetricsLog, plot, read_metrics, summary


class Tracker:
    """Stands in for the accelerator."""

    def __init__(self) -> None:
        self.logged = []

    def end_training(self):
        """Nothing is buffered."""

    def log(self, values, step):
        self.logged.append((step, values))


def record(step: int, **changes) -> dict[str, float]:
    figures = {
        "step": step,
        "loss": 5.0 / step,
        "tokens": 100 * step,
        "step_time": 0.1 * step,
        "tokens_per_second_per_chip": 1000.0 / step,
        "mfu": 0.5 / step,
        "mfu_full_square": 0.6 / step,
        "dollars": 0.01 * step,
        "compilations": 1,
    }
    return figures | changes


# The meter.


def test_a_step_in_figures():
    meter = Meter(FlopCounter(preset("gemma-2b"), 8192), CHIPS["v5e"].with_price(1.5), 4, positions_per_step=16 * 8192)
    meter.step(30.0, 16 * 8192, 16 * 8192)
    figures = meter.step(10.0, 16 * 8192 * 0.25, 16 * 8192 * 0.75)
    # 138.04 TFLOP per sequence with causal attention, of which 14.84 are attention: as much again in the full square.
    per_second_and_chip = 16 / 10 / 4
    assert figures == {
        "step_time": 10.0,
        "run_time": 40.0,
        "tokens": 16 * 8192 * 1.25,
        "tokens_per_second_per_chip": 16 * 8192 / 10 / 4,
        "trained_tokens_per_second_per_chip": 0.25 * 16 * 8192 / 10 / 4,
        "real_token_fraction": 0.75,
        "mfu": pytest.approx(138.04e12 * per_second_and_chip / 197e12, rel=1e-3),
        "mfu_full_square": pytest.approx((138.04e12 + 14.84e12) * per_second_and_chip / 197e12, rel=1e-3),
        "mfu_real_tokens": pytest.approx(0.75 * 138.04e12 * per_second_and_chip / 197e12, rel=1e-3),
        "dollars": pytest.approx(4 * 40 / 3600 * 1.5),
    }


# The log.


def open_log(path, accelerator=None, **changes) -> MetricsLog:
    return MetricsLog(path, accelerator or Tracker(), **({"total": 9, "start": 0, "enabled": True} | changes))


def test_records_reach_the_file_at_once_and_the_trackers(tmp_path):
    path, tracker = tmp_path / "metrics.jsonl", Tracker()
    log = open_log(path, tracker)
    for step in (1, 2):
        log.write(record(step))
        log.advance(record(step))
        assert read_metrics(path)[-1] == record(step)
    log.write({"step": 2, "eval_loss": 1.5})
    log.close()
    assert read_metrics(path) == log.records == [record(1), record(2), {"step": 2, "eval_loss": 1.5}]
    assert [step for step, _ in tracker.logged] == [1, 2, 2]
    assert tracker.logged[0][1] == {name: value for name, value in record(1).items() if name != "step"}


def test_resuming_drops_the_steps_to_be_taken_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    kept = [record(1), record(2), {"step": 2, "eval_loss": 1.5}]
    path.write_text("".join(json.dumps(r) + "\n" for r in [*kept, record(3), {"step": 3, "eval_loss": 1.0}]))
    log = open_log(path, start=2)
    assert read_metrics(path) == log.records == kept
    log.write(record(3, loss=7.0))
    log.close()
    assert read_metrics(path) == [*kept, record(3, loss=7.0)]


def test_a_line_that_was_cut_off_does_not_count(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(record(1)) + "\n" + json.dumps(record(2))[:30])
    assert read_metrics(path) == [record(1)]
    log = open_log(path, start=1)
    log.write(record(2))
    log.close()
    assert read_metrics(path) == [record(1), record(2)]


def test_other_hosts_write_nothing(tmp_path, capsys):
    log = open_log(tmp_path / "metrics.jsonl", enabled=False)
    log.write(record(1))
    log.advance(record(1))
    log.say("hello")
    log.close()
    assert log.records == [record(1)]
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_no_file_means_no_records(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    assert summary([]) == {}


# The summary.


def test_rates_are_medians_over_the_steps_that_compiled_nothing():
    compiled = [2, 2, 2, 3, 3, 4]
    records = [record(step, compilations=count) for step, count in enumerate(compiled, start=1)]
    records.insert(3, {"step": 3, "eval_loss": 2.5})
    records.append({"step": 6, "eval_loss": 2.25})
    result = summary(records)
    assert result == {
        "steps": 6,
        "tokens": 600,
        "loss": 5.0 / 6,
        "eval_loss": 2.25,
        "lowest_eval_loss": 2.25,
        "step_time": pytest.approx(statistics.median([0.2, 0.3, 0.5])),
        "tokens_per_second_per_chip": pytest.approx(statistics.median([1000 / 2, 1000 / 3, 1000 / 5])),
        "mfu": pytest.approx(0.5 / 3),
        "mfu_full_square": pytest.approx(0.6 / 3),
        "dollars": pytest.approx(0.06),
        "compilations": 4,
    }


def test_a_run_that_always_compiles_counts_all_its_steps():
    records = [record(step, compilations=step) for step in (1, 2, 3)]
    assert summary(records)["step_time"] == pytest.approx(0.2)
    assert "eval_loss" not in summary(records)


# The curves.


@pytest.mark.parametrize("evaluations", [[], [{"step": 2, "eval_loss": 2.0}]])
def test_the_plot_is_a_picture_of_the_records(tmp_path, evaluations):
    plot([record(1), record(2), *evaluations, record(3)], tmp_path / "curves.png", "a run")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.format == "PNG"
        assert image.width > image.height > 300
        assert len(image.convert("RGB").getcolors(1 << 24)) > 10
    plot([record(1), record(2, mfu=0.9)], tmp_path / "other.png", "a run")
    assert (tmp_path / "other.png").read_bytes() != (tmp_path / "curves.png").read_bytes()


# Compilations.


class Compiler(Backend):
    """Counts what the test says was compiled."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.compiled = 3  # by others, before

    def compilations(self) -> int:
        return self.compiled


@pytest.fixture
def watched() -> SimpleNamespace:
    backend = Compiler()
    return SimpleNamespace(backend=backend, watch=CompilationWatch(backend))


def batches(rows: int = 4, length: int = 8, count: int = 1) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": torch.zeros(rows, length), "shift_labels": torch.zeros(rows, length)} for _ in range(count)]


def silent_step(watched, step: int, micro_batches) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watched.watch.after_step(step, micro_batches)


def test_the_first_step_may_compile_and_steady_state_is_silent(watched):
    assert watched.watch.count == 0
    watched.backend.compiled += 2
    silent_step(watched, 1, batches())
    for step in range(2, 5):
        silent_step(watched, step, batches())
    # Another shape that needs no compilation is nobody's concern.
    silent_step(watched, 5, batches(length=16))
    assert watched.watch.count == 2


def test_a_changed_shape_is_named(watched):
    silent_step(watched, 1, batches(count=2))
    watched.backend.compiled += 1
    changed = batches(count=2)
    changed[1]["input_ids"] = torch.zeros(4, 16)
    with pytest.warns(UserWarning) as warned:
        watched.watch.after_step(7, changed)
    assert [str(w.message) for w in warned] == [
        "step 7 compiled 1 graph(s): the inputs changed: micro-batch 1: input_ids is now (4, 16), it was (4, 8)"
    ]
    assert watched.watch.count == 1
    # Once is enough.
    silent_step(watched, 8, changed)


def test_an_input_that_comes_or_goes_is_named(watched):
    silent_step(watched, 1, batches())
    watched.backend.compiled += 2
    with pytest.warns(UserWarning, match=r"micro-batch 1: input_ids is now \(4, 8\), it was absent; micro-batch 1: sh"):
        watched.watch.after_step(2, batches(count=2))
    watched.backend.compiled += 2
    with pytest.warns(UserWarning, match=r"compiled 2 graph.*input_ids is now absent, it was \(4, 8\)"):
        watched.watch.after_step(3, batches())


def test_without_a_changed_shape_a_value_is_suspected(watched):
    silent_step(watched, 1, batches())
    watched.backend.compiled += 1
    with pytest.warns(UserWarning, match=r"step 2 compiled 1 graph\(s\): the inputs have the shapes they had, so a va"):
        watched.watch.after_step(2, batches())


def test_what_is_expected_is_no_cause_for_alarm(watched):
    silent_step(watched, 1, batches())
    watched.backend.compiled += 1
    watched.watch.expect()
    silent_step(watched, 2, batches())
    assert watched.watch.count == 1
    watched.backend.compiled += 1
    with pytest.warns(UserWarning, match="step 3 compiled 1 graph"):
        watched.watch.after_step(3, batches())
