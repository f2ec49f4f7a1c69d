"""Whole runs in plain PyTorch: what they report, save and continue from, and how they stop."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from gemma_xla.checkpoint import CheckpointReader, complete, read_state
from gemma_xla.chips import CHIPS
from gemma_xla.cli import recipe
from gemma_xla.errors import TrainingError, UserError
from gemma_xla.train import Run, Trainer
from gemma_xla.train.finishing import export_run
from gemma_xla.train.metrics import read_metrics
from gemma_xla.train.step import TrainStep
from recipes.pretrain import main
from tests.conftest import VOCAB_SIZE, make_texts, write_jsonl

ROWS, SEQ_LEN = 4, 32
# Those of a record that depend on the machine's speed.
TIMED = {
    *("step_time", "run_time", "tokens_per_second_per_chip", "trained_tokens_per_second_per_chip"),
    *("mfu", "mfu_full_square", "mfu_real_tokens", "dollars"),
}


def fit(config) -> Trainer:
    with Run(config) as run:
        trainer = Trainer(run)
        trainer.fit()
    return trainer


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All that the newest checkpoint of a run holds."""
    reader = CheckpointReader(complete(folder / "checkpoints")[-1])
    return {name: reader.read(name) for name in reader.names()}


def assert_same_bits(left: Path, right: Path) -> None:
    ours, theirs = tensors_of(left), tensors_of(right)
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if not torch.equal(ours[name], theirs[name])} == set()


def untimed(folder: Path) -> list[dict[str, float]]:
    records = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in r.items() if name not in TIMED} for r in records]


def losses(folder: Path) -> list[float]:
    return [r["loss"] for r in untimed(folder) if "loss" in r]


def at_step(monkeypatch, number: int, action) -> None:
    """Do something with the step that is taken as the ``number``-th, before it is taken."""
    plain, numbers = TrainStep.__call__, itertools.count(1)

    def call(self, *args):
        if next(numbers) == number:
            action(self)
        return plain(self, *args)

    monkeypatch.setattr(TrainStep, "__call__", call)


def fail(_step: TrainStep) -> None:
    raise RuntimeError("power cut")


# What a run reports.


def test_each_step_has_a_full_record(finished_run):
    steps = [r for r in read_metrics(finished_run / "metrics.jsonl") if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 61))
    fields = {"step", "loss", "grad_norm", "learning_rate", "tokens", "real_token_fraction", "compilations"} | TIMED
    for record in steps:
        assert record.keys() == fields
        assert all(math.isfinite(value) for value in record.values())
        assert record["tokens"] == record["step"] * ROWS * SEQ_LEN  # training rows are always full
        assert (record["real_token_fraction"], record["learning_rate"], record["compilations"]) == (1.0, 0.01, 0)
        assert record["step_time"] > 0 and record["grad_norm"] > 0


def test_mfu_and_dollars_follow_from_the_times(finished_run):
    # gemma-test: 2 layers of width 48, 4 query and 2 key/value heads of 16, feed-forward width 96.
    weights = 2 * (48 * 16 * (4 + 2 + 2 + 4) + 3 * 48 * 96) + 48 * VOCAB_SIZE
    square = 2 * 4 * 16 * SEQ_LEN**2  # layers x heads x head_dim x pairs; two matmuls of 2 FLOPs, thrice
    dense = 6 * weights * SEQ_LEN
    causal, full = (dense + 12 * square / 2) * ROWS, (dense + 12 * square) * ROWS
    seconds = 0.0
    for record in (r for r in read_metrics(finished_run / "metrics.jsonl") if "loss" in r):
        time = record["step_time"]
        seconds += time
        # What it cost includes the evaluations and checkpoints between the steps.
        assert record["run_time"] >= seconds * (1 - 1e-9)
        assert record["mfu"] == pytest.approx(causal / time / 197e12, rel=1e-9)
        assert record["mfu_full_square"] == pytest.approx(full / time / 197e12, rel=1e-9)
        assert record["mfu_real_tokens"] == pytest.approx(record["mfu"], rel=1e-9)
        for name in ("tokens_per_second_per_chip", "trained_tokens_per_second_per_chip"):
            assert record[name] == pytest.approx(ROWS * SEQ_LEN / time, rel=1e-9)
        assert record["dollars"] == pytest.approx(record["run_time"] / 3600 * CHIPS["v5e"].price.value, rel=1e-9)


def test_tensorboard_has_the_same_losses(finished_run):
    events = EventAccumulator(str(finished_run / "tensorboard"))
    events.Reload()
    records = read_metrics(finished_run / "metrics.jsonl")
    for name in ("loss", "eval_loss", "mfu"):
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        assert logged == [(r["step"], pytest.approx(r[name], rel=1e-6)) for r in records if name in r]
        assert logged


def test_the_loss_falls(finished_run):
    first, *_, last = losses(finished_run)
    assert first == pytest.approx(math.log(VOCAB_SIZE), rel=0.02)
    assert last < 0.5 * math.log(VOCAB_SIZE)


def test_the_learning_rate_follows_the_schedule(tiny_config, tmp_path):
    schedule = "train.schedule={kind: linear, warmup_steps: 2, final: 0.0}"
    fit(tiny_config(tmp_path / "run", "train.steps=6", schedule, "train.optimizer.lr=0.02"))
    rates = [r["learning_rate"] for r in untimed(tmp_path / "run") if "loss" in r]
    assert rates == pytest.approx([0.0, 0.01, 0.02, 0.015, 0.01, 0.005])


def test_the_folder_says_how_it_was_made(finished_run):
    state = read_state(complete(finished_run / "checkpoints")[-1])
    assert state["step"] == 60
    assert state["tokens"] == 60 * ROWS * SEQ_LEN
    assert state["config"]["train"]["optimizer"]["lr"] == 0.01
    assert state["versions"]["torch"] == importlib.metadata.version("torch")
    assert {p.name for p in finished_run.iterdir()} >= {"config.yaml", "curves.png", "tokenizer", "export"}
    card = (finished_run / "export" / "README.md").read_text()
    assert "train.jsonl (weight 1)" in card and "| steps | 60 |" in card


# Evaluation.


def held_out_pieces(corpus: Path, tokenizer, seq_len: int) -> list[list[int]]:
    """The held-out documents, cut where rows of ``seq_len`` predictions end."""
    pieces, room = [], seq_len
    for line in (corpus / "eval.jsonl").read_text().splitlines():
        ids = [2, *tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"], 1]
        while len(ids) > 1:
            pieces.append(ids[: room + 1])
            ids = ids[room:]
            room -= len(pieces[-1]) - 1
            room = room or seq_len
    return pieces


def test_the_held_out_loss_is_that_of_transformers(finished_run, corpus):
    model = AutoModelForCausalLM.from_pretrained(finished_run / "export", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(finished_run / "export")
    total = count = hits = 0
    for piece in held_out_pieces(corpus, tokenizer, SEQ_LEN):
        with torch.no_grad():
            logits = model(torch.tensor([piece[:-1]])).logits[0]
        total += F.cross_entropy(logits, torch.tensor(piece[1:]), reduction="sum").item()
        count += len(piece) - 1
        hits += (logits.argmax(-1) == torch.tensor(piece[1:])).sum().item()
    (evaluation,) = [r for r in read_metrics(finished_run / "metrics.jsonl") if "eval_loss" in r]
    assert count % (ROWS * SEQ_LEN) != 0  # so that the last rows are padding
    assert evaluation["eval_loss"] == pytest.approx(total / count, rel=1e-5)
    assert evaluation["eval_accuracy"] == pytest.approx(hits / count, rel=1e-9)


def test_evaluations_and_checkpoints_come_when_they_are_due(tiny_config, tmp_path):
    trainer = fit(tiny_config(tmp_path / "run", "train.steps=7", "eval.every=3", "checkpoint.every=2"))
    assert [r["step"] for r in untimed(tmp_path / "run") if "eval_loss" in r] == [3, 6, 7]
    assert [folder.name[-1] for folder in complete(tmp_path / "run" / "checkpoints")] == ["6", "7"]
    assert trainer.evaluator.figures().items() <= untimed(tmp_path / "run")[-1].items()


def test_an_evaluation_may_be_cut_short(tiny_config, tmp_path):
    for batches in ("1", "99", "null"):
        fit(tiny_config(tmp_path / batches, "train.steps=1", f"eval.batches={batches}"))
    first, many, every = (untimed(tmp_path / batches)[-1]["eval_loss"] for batches in ("1", "99", "null"))
    assert first != every
    assert many == every


def test_without_held_out_text_there_is_no_evaluation(tiny_config, tmp_path):
    fit(tiny_config(tmp_path / "run", "train.steps=2", "data.eval=null", "data.eval_fraction=0", "eval.every=1"))
    assert [r.keys() & {"eval_loss"} for r in untimed(tmp_path / "run")] == [set(), set()]


# The same run in other ways.


@pytest.fixture(scope="module")
def plain(tiny_config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "run"
    fit(tiny_config(folder, "checkpoint.every=2", "eval.every=2"))
    return folder


def test_the_same_config_gives_the_same_bits(plain, tiny_config, tmp_path):
    fit(tiny_config(tmp_path / "again"))
    assert_same_bits(plain, tmp_path / "again")
    fit(tiny_config(tmp_path / "other", "seed=1"))
    assert losses(tmp_path / "other") != losses(plain)


@pytest.mark.parametrize("override", ["train.grad_accum=2", "train.grad_accum=4", "train.loss_chunk=5"])
def test_micro_batches_change_nothing(plain, tiny_config, tmp_path, override):
    fit(tiny_config(tmp_path / "run", override))
    assert losses(tmp_path / "run") == pytest.approx(losses(plain), abs=1e-6, rel=1e-6)


def test_a_batch_may_be_given_per_device(plain, tiny_config, tmp_path):
    fit(tiny_config(tmp_path / "run", "train.batch_size=null", "train.batch_size_per_device=2", "train.grad_accum=2"))
    assert losses(tmp_path / "run") == pytest.approx(losses(plain), abs=1e-6, rel=1e-6)


def test_rematerialisation_changes_nothing(plain, tiny_config, tmp_path):
    fit(tiny_config(tmp_path / "run", "train.remat=full"))
    assert_same_bits(plain, tmp_path / "run")


def test_bfloat16_is_for_computing_alone(plain, tiny_config, tmp_path):
    fit(tiny_config(tmp_path / "run", "train.compute_dtype=bfloat16"))
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "run").values()} == {torch.float32}
    assert losses(tmp_path / "run") != losses(plain)
    assert losses(tmp_path / "run") == pytest.approx(losses(plain), rel=0.02)


# Continuing.


@pytest.mark.parametrize("crash", [4, 5, 6])
def test_an_interrupted_run_ends_with_the_bits_of_an_uninterrupted_one(
    plain, tiny_config, tmp_path, monkeypatch, crash, capsys
):
    config = tiny_config(tmp_path / "run", "checkpoint.every=2", "eval.every=2")
    with monkeypatch.context() as patch:
        at_step(patch, crash, fail)
        with pytest.raises(RuntimeError, match="power cut"):
            fit(config)
    left = (crash - 1) // 2 * 2
    assert complete(tmp_path / "run" / "checkpoints")[-1].name == f"step-{left:08d}"
    assert len(losses(tmp_path / "run")) < crash
    with Run(config) as run:
        trainer = Trainer(run)
        assert trainer.step == left
        assert f"Continuing from step {left} (" in capsys.readouterr().out
        trainer.fit()
    assert_same_bits(plain, tmp_path / "run")
    assert untimed(tmp_path / "run") == untimed(plain)
    ours, theirs = (read_state(complete(f / "checkpoints")[-1]) for f in (tmp_path / "run", plain))
    assert (ours["data"], ours["tokens"]) == (theirs["data"], theirs["tokens"])
    steps = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    assert ours["seconds"] >= steps[-1]["run_time"] > sum(r["step_time"] for r in steps)


def test_a_longer_run_continues_a_shorter_one(plain, tiny_config, tmp_path):
    fit(tiny_config(tmp_path / "run", "train.steps=3"))
    fit(tiny_config(tmp_path / "run", "train.steps=6"))
    assert_same_bits(plain, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(plain)


def test_a_finished_run_has_nothing_left_to_do(tiny_config, tmp_path):
    config = tiny_config(tmp_path / "run", "train.steps=2")
    main(config)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.suffix in (".safetensors", ".jsonl")}
    assert len(before) == 3
    main(config)
    assert {p: p.read_bytes() for p in before} == before


def test_another_architecture_is_not_continued(plain, tiny_config):
    state = {path: path.stat().st_mtime_ns for path in (plain / "checkpoints").rglob("*")}
    overrides = "model.overrides.num_hidden_layers=3", "model.overrides.rope_theta=500.0"
    with pytest.raises(UserError) as error:
        fit(tiny_config(plain, *overrides))
    assert "num_hidden_layers (2, now 3), rope_theta (10000.0, now 500.0); set the config back" in str(error.value)
    assert {path: path.stat().st_mtime_ns for path in (plain / "checkpoints").rglob("*")} == state


def test_other_data_is_not_continued(plain, tiny_config):
    with pytest.raises(UserError, match="the saved position has num_rows 4, but this run has 8"):
        fit(tiny_config(plain, "train.batch_size=8"))


def test_a_folder_with_a_checkpoint_can_be_refused(plain, tiny_config):
    before = {path: path.stat().st_mtime_ns for path in plain.rglob("*")}
    with pytest.raises(UserError) as error:
        Run(tiny_config(plain, "checkpoint.resume=never"))
    assert str(error.value) == (
        f"output_dir: {plain} holds the checkpoint step-00000006; choose another folder, or checkpoint.resume=auto to "
        "continue it"
    )
    assert {path: path.stat().st_mtime_ns for path in plain.rglob("*")} == before


# Stopping.


def spoil(step: TrainStep) -> None:
    with torch.no_grad():
        next(step.model.parameters())[0, 0] = math.nan


def test_a_loss_that_is_no_number_stops_the_run(plain, tiny_file, tmp_path, monkeypatch, capsys):
    at_step(monkeypatch, 3, spoil)
    arguments = ["--config", str(tiny_file(tmp_path / "run")), "--set", "checkpoint.every=1"]
    with pytest.raises(SystemExit) as stop:
        recipe("Pretrain.", main, arguments)
    assert stop.value.code == 3
    message = capsys.readouterr().err.partition("error: ")[2]
    good = tmp_path / "run" / "checkpoints" / "step-00000002"
    assert message.startswith(f"step 3: the loss is nan and the gradient norm nan; the newest checkpoint, {good}, is")
    rows = message.strip().split("\n")[1:]
    assert [row.split()[:4] for row in rows] == [["row", f"{n}:", "data.train[0]", "document"] for n in range(ROWS)]
    assert complete(good.parent)[-1] == good
    assert losses(tmp_path / "run") == losses(plain)[:2]
    assert all(tensor.isfinite().all() for tensor in tensors_of(tmp_path / "run").values())
    export_run(tmp_path / "run", tmp_path / "model")
    # With the cause gone the run goes on where it was.
    monkeypatch.undo()
    recipe("Pretrain.", main, arguments)
    assert losses(tmp_path / "run") == losses(plain)


def test_the_documents_named_are_those_of_the_batch(tiny_config, tmp_path, monkeypatch):
    texts, seen = make_texts(30, seed=1), []
    path = write_jsonl(tmp_path / "texts.jsonl", texts)
    at_step(monkeypatch, 2, spoil)
    plain = Trainer._next_micro_batches
    monkeypatch.setattr(Trainer, "_next_micro_batches", lambda self: seen.append(plain(self)) or seen[-1])
    with Run(tiny_config(tmp_path / "run", f"data.train={path}")) as run:
        trainer = Trainer(run)
        with pytest.raises(TrainingError, match="step 2: .* there is no checkpoint yet") as error:
            trainer.fit()
    for row, line in zip(seen[1][0]["input_ids"], str(error.value).split("\n")[1:], strict=True):
        names = line.partition(": ")[2].split(", ")
        pieces = [piece for piece in trainer.run.tokenizer.decode(row).split("<bos>") if piece]
        for name, piece in zip(names, pieces, strict=True):
            assert piece in texts[int(name.rpartition(" ")[2])]


def test_a_learning_rate_beyond_reason_stops_the_run(tiny_config, tmp_path):
    with pytest.raises(TrainingError, match="Lower train.optimizer.lr"):
        fit(tiny_config(tmp_path / "run", "train.optimizer.lr=1e30"))
