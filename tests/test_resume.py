"""Runs that are killed, stopped, damaged and moved end with the bits of one that was not."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from gemma_xla import interrupts
from gemma_xla.backend import Backend
from gemma_xla.checkpoint import CheckpointReader, complete, newest, read_state
from gemma_xla.checkpoint.folder import seal
from gemma_xla.errors import TrainingError, UserError
from gemma_xla.train import Run, Trainer
from gemma_xla.train.metrics import read_metrics
from tests import runs
from tests.test_checkpoint import save
from tests.test_trainer import assert_same_bits, fit, losses, untimed

STEPS = 24
SETTINGS = [f"train.steps={STEPS}", "checkpoint.every=3", "eval.every=5", "export.at_end=false"]


def arguments(path: Path, *overrides: str) -> list[str]:
    return ["--config", str(path), *(part for override in overrides for part in ("--set", override))]


@pytest.fixture(scope="module", params=[1, 2], ids=["whole batches", "accumulated"])
def settings(request) -> list[str]:
    return [*SETTINGS, f"train.grad_accum={request.param}"]


@pytest.fixture(scope="module")
def undisturbed(settings, tiny_config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    fit(tiny_config(folder, *settings))
    return folder


def wait_for_steps(folder: Path, count: int, process) -> None:
    """Wait until a run has reported ``count`` steps, or has ended."""
    while process.is_alive() and len(read_metrics(folder / "metrics.jsonl")) < count:
        time.sleep(0.002)


def assert_undisturbed(folder: Path, undisturbed: Path) -> None:
    assert_same_bits(folder, undisturbed)
    assert untimed(folder) == untimed(undisturbed)
    ours, theirs = (read_state(complete(f / "checkpoints")[-1]) for f in (folder, undisturbed))
    for key in ("step", "data", "tokens", "rng"):
        assert ours[key] == theirs[key], key


# Kills.


def test_a_run_killed_at_random_ends_with_the_same_bits(settings, undisturbed, tiny_file, tmp_path):
    draw, folder = random.Random(1), tmp_path / "run"
    given = arguments(tiny_file(folder), *settings)
    kills = 0
    for until in (2, 6, 11, 17, 23):
        process = runs.start(given, tmp_path / "log")
        wait_for_steps(folder, until, process)
        time.sleep(draw.random() * 0.05)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
    assert kills >= 4
    process = runs.start(given, tmp_path / "log")
    process.join()
    assert process.exitcode == 0, (tmp_path / "log").read_text()[-3000:]
    assert_undisturbed(folder, undisturbed)


def die_at_line(number: int) -> None:
    """End this process, as SIGKILL would, at the ``number``-th line that is run of what writes checkpoints."""
    lines = itertools.count()

    def trace(frame, event, _arg):
        if not frame.f_code.co_filename.endswith(("saver.py", "storage.py", "folder.py", "tensor_file.py")):
            return None
        if event == "line" and next(lines) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    threading.settrace(trace)
    sys.settrace(trace)


def test_a_kill_at_any_line_leaves_a_whole_checkpoint(tmp_path):
    """The second of three checkpoints is there or the first, with its own values; the next save finds nothing amiss."""
    tensors = {"a": torch.arange(6.0), "b": torch.tensor(1.0)}
    backend, outcomes = Backend(torch.device("cpu")), set()
    for line in itertools.count(0, 3):
        root = tmp_path / str(line)
        save(root, 1, tensors, {}, backend)
        if (child := os.fork()) == 0:
            die_at_line(line)
            save(root, 2, {name: tensor + 1 for name, tensor in tensors.items()}, {}, backend, keep_last=1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        found = newest(root, pytest.fail)
        outcomes.add(found.state["step"])
        added = found.state["step"] - 1
        for name, tensor in tensors.items():
            assert torch.equal(CheckpointReader(found.folder).read(name), tensor + added), line
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        save(root, 2, tensors, {}, backend)
        assert newest(root, pytest.fail).state["step"] == 2
    assert outcomes == {1, 2}
    assert line > 100


# Signals.


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_at_the_next_step(tiny_file, tiny_config, tmp_path, number, code):
    folder, given = tmp_path / "run", [*SETTINGS, "checkpoint.every=0"]
    process = runs.start(arguments(tiny_file(folder), *given), tmp_path / "log")
    wait_for_steps(folder, 4, process)
    os.kill(process.pid, number)
    process.join(30)
    assert process.exitcode == code
    (left,) = complete(folder / "checkpoints")
    steps = [r["step"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]
    assert read_state(left)["step"] == steps[-1] < STEPS
    log = (tmp_path / "log").read_text()
    assert f"{number.name}: saved at step {steps[-1]}; start again to continue from there" in log
    assert "Traceback" not in log
    fit(tiny_config(folder, *given))
    fit(tiny_config(tmp_path / "plain", *given))
    assert_undisturbed(folder, tmp_path / "plain")


# Damage.


def test_a_damaged_checkpoint_is_passed_over_and_kept(tiny_config, tmp_path, capsys):
    folder = tmp_path / "run"
    fit(tiny_config(folder, *SETTINGS, "train.steps=6", "train.schedule={kind: constant}"))
    damaged = folder / "checkpoints" / "step-00000006"
    tensors = damaged / "tensors-00000.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    capsys.readouterr()
    fit(tiny_config(folder, *SETTINGS))
    said = capsys.readouterr().out
    assert f"warning: checkpoint {damaged}: tensors-00000.safetensors is " in said
    assert f"Continuing from step 3 ({folder}/checkpoints/step-00000003)" in said
    assert f"{damaged} is now called damaged-step-00000006" in said
    fit(tiny_config(tmp_path / "plain", *SETTINGS))
    assert_undisturbed(folder, tmp_path / "plain")
    assert (folder / "checkpoints" / "damaged-step-00000006").is_dir()


def test_if_all_are_damaged_the_run_is_not_begun_anew(tiny_config, tmp_path):
    folder = tmp_path / "run"
    fit(tiny_config(folder, *SETTINGS, "train.steps=6"))
    for checkpoint in complete(folder / "checkpoints"):
        (checkpoint / "state.json").write_text("{}")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"none of its 2 checkpoint\(s\) is whole; restore one from a copy, or choose"):
        fit(tiny_config(folder, *SETTINGS))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


def test_a_full_disk_does_not_end_a_run(tiny_config, tmp_path, monkeypatch, capsys):
    from gemma_xla.checkpoint import saver

    plain, calls = saver.write_parts, itertools.count(1)

    def full(stem, held, say):
        if next(calls) in (2, 3):
            raise OSError(28, "No space left on device")
        plain(stem, held, say)

    monkeypatch.setattr(saver, "write_parts", full)
    fit(tiny_config(tmp_path / "run", *SETTINGS, "train.steps=12"))
    said = capsys.readouterr().out
    for step in (6, 9):
        assert f"the checkpoint of step {step} could not be written (No space left on device); training goes on" in said
    assert [read_state(folder)["step"] for folder in complete(tmp_path / "run" / "checkpoints")] == [3, 12]
    monkeypatch.undo()


def test_if_the_last_checkpoint_cannot_be_written_the_run_says_so(tiny_config, tmp_path, monkeypatch):
    from gemma_xla.checkpoint import saver

    def full(*_args):
        raise OSError(28, "No space left on device")

    fit(tiny_config(tmp_path / "run", *SETTINGS, "train.steps=3"))
    monkeypatch.setattr(saver, "write_parts", full)
    with pytest.raises(TrainingError, match="the checkpoint of step 4, the latest, could not be written"):
        fit(tiny_config(tmp_path / "run", *SETTINGS, "train.steps=4"))
    monkeypatch.undo()
    fit(tiny_config(tmp_path / "run", *SETTINGS, "train.steps=4"))
    assert losses(tmp_path / "run")[-1] == fit(tiny_config(tmp_path / "p", "train.steps=4")).log.records[-2]["loss"]


def test_metrics_that_could_not_be_written_are_written_later(tiny_config, tmp_path, capsys):
    folder = tmp_path / "run"
    with Run(tiny_config(folder, *SETTINGS, "train.steps=8")) as run:
        trainer = Trainer(run)
        plain, calls = trainer._next_micro_batches, itertools.count(1)

        def blocked():
            # A folder in the file's place, for two steps.
            if (number := next(calls)) == 4:
                (folder / "metrics.jsonl").unlink()
                (folder / "metrics.jsonl").mkdir()
            elif number == 6:
                (folder / "metrics.jsonl").rmdir()
            return plain()

        trainer._next_micro_batches = blocked
        trainer.fit()
    assert [r["step"] for r in untimed(folder) if "loss" in r] == list(range(1, 9))
    assert capsys.readouterr().out.count("warning: metrics could not be written (Is a directory)") == 1


# Changes.

REFUSED = {
    "train.optimizer.lr=0.02": "train.optimizer.lr (0.01, now 0.02)",
    "train.optimizer.weight_decay=0.2": "train.optimizer.weight_decay (0.1, now 0.2)",
    "train.optimizer.clip_norm=0": "train.optimizer.clip_norm (1.0, now 0",
    "train.schedule.warmup_steps=2": "train.schedule.warmup_steps (0, now 2)",
    "train.compute_dtype=bfloat16": "train.compute_dtype (float32, now bfloat16)",
    "train.precision=int8": "train.precision (default, now int8)",
    "data.seq_len=16": "data.seq_len (32, now 16)",
}


@pytest.fixture(scope="module")
def short(tiny_config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("short") / "run"
    fit(tiny_config(folder, "train.steps=2"))
    return folder


@pytest.mark.parametrize("change", REFUSED)
def test_a_change_that_decides_results_is_refused_by_name_unless_accepted(short, tiny_config, change):
    key = change.partition("=")[0]
    with pytest.raises(UserError) as error, Run(tiny_config(short, "train.steps=3", change)):
        pass
    message = str(error.value)
    assert f"the config has changed in what decides the results: {REFUSED[change]}" in message
    assert message.endswith(f"set it back, choose another output_dir, or set checkpoint.accept_changes=[{key}]")
    with Run(tiny_config(short, "train.steps=3", change, f"checkpoint.accept_changes=[{key}]")) as run:
        assert Trainer(run).step == 2


@pytest.mark.parametrize("change", [None, "train.precision=int8"])
def test_a_checkpoint_from_before_a_setting_counts_as_its_default(tiny_config, tmp_path, change):
    folder = tmp_path / "run"
    fit(tiny_config(folder, "train.steps=2"))
    path = complete(folder / "checkpoints")[-1] / "state.json"
    state = json.loads(path.read_text())
    for name in ("precision", "int8_products", "int8_rounding", "compile"):
        del state["config"]["train"][name]
    path.write_text(seal({name: value for name, value in state.items() if name != "xxh3"}))
    config = tiny_config(folder, "train.steps=3", *([change] if change else []))
    if change:
        with pytest.raises(UserError, match=r"train.precision \(default, now int8\)"), Run(config):
            pass
    else:
        assert fit(config).step == 3


def test_all_changes_are_named_at_once(short, tiny_config):
    changes = ["train.optimizer.lr=0.02", "train.optimizer.eps=1e-6", "train.compute_dtype=bfloat16"]
    with pytest.raises(UserError) as error, Run(tiny_config(short, *changes)):
        pass
    assert "[train.optimizer.lr, train.optimizer.eps, train.compute_dtype]" in str(error.value)


def test_the_number_of_steps_decides_where_the_schedule_depends_on_it(tiny_config, tmp_path):
    schedule = "train.schedule.kind=cosine"
    fit(tiny_config(tmp_path / "run", "train.steps=2", schedule))
    with pytest.raises(UserError, match=r"decides the results: train.steps \(2, now 4\)"):
        fit(tiny_config(tmp_path / "run", "train.steps=4", schedule))


@pytest.mark.parametrize(
    "changes",
    [["seed=1"], ["data.shuffle=false"], ["data.train={both}"], ["data.eval=null", "data.eval_fraction=0.5"]],
    ids=" ".join,
)
def test_other_data_is_refused(short, tiny_config, corpus, changes):
    both = f"[{corpus}/train.jsonl, {corpus}/eval.jsonl]"
    given = [change.replace("{both}", both) for change in changes]
    with pytest.raises(UserError, match="^data: the saved position has "), Run(tiny_config(short, *given)) as run:
        Trainer(run)


@pytest.mark.parametrize(
    "change",
    [
        *("train.remat=full", "train.loss_chunk=5", "train.grad_accum=2", "train.compile=false", "data.prefetch=4"),
        *("checkpoint.every=1", "eval.batches=1", "export.dtype=bfloat16", "hardware.chip=v5p"),
        "log.sample_prompt=he",
    ],
)
def test_what_changes_no_result_may_change(short, tiny_config, change):
    with Run(tiny_config(short, "train.steps=3", change)) as run:
        assert Trainer(run).step == 2


def test_another_tokenizer_is_refused(tiny_config, tmp_path):
    from gemma_xla.data.tokenizer import train_tokenizer

    fit(tiny_config(tmp_path / "run", "train.steps=2"))
    (tmp_path / "run" / "tokenizer").rename(tmp_path / "away")
    texts = ["zebra quartz vex jock nymph " * 20]
    train_tokenizer(texts, 493, tmp_path / "other")
    given = [f"data.tokenizer={tmp_path}/other"]
    with pytest.raises(UserError, match="the run's tokenizer is not the one it was trained with; put back the folder"):
        fit(tiny_config(tmp_path / "run", *given))


def test_a_run_may_be_moved(tiny_config, tiny_file, tmp_path, corpus):
    """Folder, data and working directory are elsewhere when it goes on."""
    fit(tiny_config(tmp_path / "run", "train.steps=3"))
    (tmp_path / "run").rename(tmp_path / "moved")
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train.jsonl", "eval.jsonl"):
        (data / name).write_bytes((corpus / name).read_bytes())
    elsewhere = [f"data.train={data}/train.jsonl", f"data.eval={data}/eval.jsonl"]
    fit(tiny_config(tmp_path / "moved", "train.steps=6", *elsewhere))
    fit(tiny_config(tmp_path / "plain", "train.steps=6"))
    assert_same_bits(tmp_path / "moved", tmp_path / "plain")


def test_the_whole_state_travels(short):
    state = json.loads((complete(short / "checkpoints")[-1] / "state.json").read_text())
    assert state.keys() >= {"step", "tokens", "seconds", "rng", "data", "config", "model", "versions", "tokenizer"}
    assert state["config"]["train"]["optimizer"]["lr"] == 0.01
    names = set(CheckpointReader(complete(short / "checkpoints")[-1]).names())
    weights = {name for name in names if name.startswith("model/")}
    moments = {f"optimizer/{n.removeprefix('model/')}/{m}" for n in weights for m in ("exp_avg", "exp_avg_sq")}
    assert names == weights | moments


def test_a_signal_does_not_wait_for_an_evaluation(tiny_config, tmp_path, monkeypatch):
    """It is made up for when the run goes on."""
    folder = tmp_path / "run"
    with Run(tiny_config(folder, *SETTINGS, "eval.every=4")) as run:
        trainer = Trainer(run)
        figures = trainer.evaluator.figures

        def interrupted():
            # As if it had come while the held-out text was read.
            monkeypatch.setattr(interrupts, "_received", signal.SIGTERM)
            return figures()

        monkeypatch.setattr(trainer.evaluator, "figures", interrupted)
        with pytest.raises(interrupts.Interrupted) as stop:
            trainer.fit()
    monkeypatch.undo()
    assert (stop.value.exit_code, trainer.step) == (75, 4)
    assert [r["step"] for r in untimed(folder) if "eval_loss" in r] == []
    fit(tiny_config(folder, *SETTINGS, "eval.every=4"))
    fit(tiny_config(tmp_path / "plain", *SETTINGS, "eval.every=4"))
    assert_undisturbed(folder, tmp_path / "plain")
