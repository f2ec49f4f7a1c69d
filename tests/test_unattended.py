"""Whole runs that nobody looks at: what their logs say, and how they end when they stand still."""

from __future__ import annotations

import collections
import re
import shutil
import threading
import time
from pathlib import Path

import pytest

from gemma_xla.checkpoint import Saver, complete, read_state
from gemma_xla.data.loader import TrainLoader
from gemma_xla.errors import UserError
from gemma_xla.train.evaluation import Evaluator
from gemma_xla.train.metrics import read_metrics
from gemma_xla.train.step import TrainStep
from recipes.pretrain import main
from tests import runs
from tests.test_distributed import ended
from tests.test_resume import arguments
from tests.test_trainer import assert_same_bits, at_step, fit, losses, untimed

SETTINGS = ["train.steps=12", "checkpoint.every=4", "eval.every=4", "export.at_end=false"]
# Seconds; a step takes some hundredths, and all of the rest of these runs less than the limit on a busy machine.
SOON = "watch={hang_floor: 3, hang_limit: 30, heartbeat: 0.5}"

# What stands still, and the call that never returns.
PLACES = {
    "data": (TrainLoader, "__next__", 9),
    "step": (TrainStep, "__call__", 9),
    "evaluation": (Evaluator, "figures", 1),
    "saving": (Saver, "wait", 2),
    "building": (TrainStep, "__init__", 1),
}


def hanging(given: list[str], log: Path, place: str) -> None:
    """A run that stands still at one of the calls of something."""
    kind, name, number = PLACES[place]
    plain, calls = getattr(kind, name), []

    def call(*args, **options):
        calls.append(1)
        if len(calls) == number:
            threading.Event().wait()
        return plain(*args, **options)

    setattr(kind, name, call)
    runs.pretrain(given, log)


def alone(function, *args) -> set[int]:
    """The exit codes of a process of its own."""
    process = runs._context.Process(target=function, args=args, daemon=True)
    process.start()
    return ended([process])


@pytest.mark.parametrize("place", ["step", *(pytest.param(p, marks=pytest.mark.slow) for p in PLACES if p != "step")])
def test_a_run_that_stands_still_is_ended_and_goes_on_when_started_again(tiny_file, tiny_config, tmp_path, place):
    folder, log = tmp_path / "run", tmp_path / "log"
    given = arguments(tiny_file(folder), *SETTINGS)
    assert alone(hanging, arguments(tiny_file(folder), *SETTINGS, SOON), log, place) == {4}
    text = log.read_text()
    expected = {
        "data": "hung: waiting for step 9, ",
        "step": "hung: waiting for step 9, ",
        "evaluation": "hung: evaluating after step 4, ",
        "saving": "hung: saving after step 8, ",
        "building": "hung: building the model, ",
    }[place]
    key = "hang_floor" if place in ("data", "step") else "hang_limit"
    assert f"error: {expected}" in text and f"(watch.{key})" in text and "(exit code 4)" in text
    assert f"still {expected.removeprefix('hung: ')}" in text
    assert "Traceback" not in text
    assert "in hanging\n" in text or "in call\n" in text
    found = complete(folder / "checkpoints")
    last = read_state(found[-1])["step"] if found else 0
    assert last == {"data": 8, "step": 8, "saving": 4}.get(place, 0)
    if place != "building":
        assert "in call\n" in (folder / "hang-0.txt").read_text()
    # Nothing is in the way, and the bits are those of a run that was left alone.
    assert alone(runs.pretrain, given, log) == {0}, log.read_text()[-2000:]
    fit(tiny_config(tmp_path / "undisturbed", *SETTINGS))
    assert_same_bits(folder, tmp_path / "undisturbed")
    assert untimed(folder) == untimed(tmp_path / "undisturbed")


def test_slow_starts_evaluations_and_saves_are_no_hangs(tiny_config, tmp_path, monkeypatch):
    for kind, name in ((TrainStep, "__init__"), (Evaluator, "figures"), (Saver, "save")):
        plain = getattr(kind, name)

        def slow(*args, plain=plain, **options):
            time.sleep(1.5)
            return plain(*args, **options)

        monkeypatch.setattr(kind, name, slow)
    at_step(monkeypatch, 2, lambda _step: time.sleep(1.5))  # one of the first steps
    fit(tiny_config(tmp_path / "run", *SETTINGS, "train.steps=8", "watch={hang_floor: 1, hang_limit: 60}"))
    assert len(losses(tmp_path / "run")) == 8


def test_the_log_of_a_run_is_plain_lines(tiny_config, tmp_path, capsys):
    main(tiny_config(tmp_path / "run", *SETTINGS))
    out, err = capsys.readouterr()
    assert "\r" not in out + err
    lines = [line for line in out.splitlines() if line.startswith("step ")]
    assert lines[0].startswith("step 1/12: loss 6.")
    assert re.fullmatch(
        r"step 12/12: loss \d\.\d{3}, [\d,]+ tokens/s/chip, MFU \d\.\d%, \d\.\d\d s/step, 0 compiled", lines[-2]
    )
    assert lines[-1].startswith("step 12: held-out loss ")


# Spikes.


def test_a_spike_is_reported_with_its_text_and_kept_as_a_figure(tiny_config, tmp_path, monkeypatch, capsys):
    plain = TrainStep.__call__
    steps: list[int] = []

    def call(self, *args):
        steps.append(1)
        result = plain(self, *args)
        return result * result.new_tensor([20.0, 30.0, 1.0, 1.0]) if len(steps) in (70, 71) else result

    monkeypatch.setattr(TrainStep, "__call__", call)
    config = tiny_config(tmp_path / "run", "train.steps=75", "export.at_end=false", "watch.heartbeat=0.001")
    fit(config)
    records = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    assert [r["step"] for r in records if "loss_spike" in r] == [70, 71]
    assert [r["step"] for r in records if "grad_norm_spike" in r] == [70, 71]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: step")]
    assert len(lines) == 1
    assert re.match(r"warning: step 70 stands out: loss \d.*, usually 0\.\d+ \(\d+ deviations\); gradient no", lines[0])
    assert "; its text: row 0: data.train[0] document " in lines[0] and "; row 3: " in lines[0]


# The disk.


def test_a_disk_that_fills_is_told_before_a_save_fails(tiny_config, tmp_path, monkeypatch, capsys):
    usage, plain = collections.namedtuple("Usage", "total used free"), shutil.disk_usage
    filled = False

    def disk_usage(path):
        return usage(10**12, 10**12, 1000) if filled else plain(path)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)

    def fill(_step: TrainStep) -> None:
        nonlocal filled
        filled = True

    at_step(monkeypatch, 6, fill)
    config = tiny_config(tmp_path / "run", *SETTINGS)
    fit(config)
    out = capsys.readouterr().out
    assert (
        out.count("has room for 0.0 GB, but the checkpoints and the export still to come need 0.0 GB; make room") == 1
    )
    assert [path.name for path in complete(tmp_path / "run" / "checkpoints")] == ["step-00000008", "step-00000012"]
    with pytest.raises(UserError, match="but the checkpoints and the export of this run need"):
        fit(config)
