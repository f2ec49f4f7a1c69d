"""Fine-tuning from a run of ours to an adapter: what it learns from, what it reports, what it keeps, how it resumes."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from gemma_xla.checkpoint import CheckpointReader, complete, read_state
from gemma_xla.chips import CHIPS
from gemma_xla.errors import UserError
from gemma_xla.flops import FlopCounter
from gemma_xla.infer.text import open_model, stream
from gemma_xla.model.config import preset
from gemma_xla.train import Run
from gemma_xla.train.evaluation import best, is_stale
from gemma_xla.train.export import export_run
from gemma_xla.train.metrics import read_metrics
from gemma_xla.weights import open_weights
from recipes.finetune import main
from tests import runs
from tests.conftest import VOCAB_SIZE
from tests.test_resume import arguments, assert_undisturbed, wait_for_steps
from tests.test_trainer import fit, untimed

SEQ_LEN = 32
LORA = "lora={rank: 4, alpha: 16}"
PAIRS = [("he was", " in the hat"), ("it is", " for the hat and for his boat"), ("be at", " his boat by the end")]


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> Path:
    """A folder with train.jsonl and eval.jsonl of prompts and completions, and chats.jsonl."""
    folder, draw = tmp_path_factory.mktemp("examples"), random.Random(0)
    for name, count in (("train", 50), ("eval", 9)):
        rows = [{"prompt": p, "completion": c} for p, c in draw.choices(PAIRS, k=count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chats = [
        {"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": c.strip()}]} for p, c in PAIRS
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return folder


@pytest.fixture(scope="module")
def given(finished_run, examples) -> list[str]:
    """Overrides that make the tiny run one of fine-tuning."""
    return [
        f"model={{init_from: {finished_run}}}",
        LORA,
        f"data={{train: {examples}/train.jsonl, eval: {examples}/eval.jsonl, seq_len: {SEQ_LEN}}}",
        "train.steps=24",
        "eval.every=6",
        "checkpoint.every=3",
    ]


@pytest.fixture(scope="module")
def tuned(given, tiny_config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tuned") / "run"
    extra = ["eval.at_start=true", "export.verify=true", "export.merged=true", "eval.prompts=[he was, it is]"]
    main(tiny_config(folder, *given, *extra))
    return folder


def evaluations(folder: Path) -> list[dict]:
    return [r for r in read_metrics(folder / "metrics.jsonl") if "eval_loss" in r]


def held_out(examples: Path, tokenizer) -> list[tuple[list[int], list[int]]]:
    """Prompt and completion of each example as tokens."""
    lines = [json.loads(line) for line in (examples / "eval.jsonl").read_text().splitlines()]
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    return [
        ([tokenizer.bos_token_id, *encode(r["prompt"])], [*encode(r["completion"]), tokenizer.eos_token_id])
        for r in lines
    ]


@torch.no_grad()
def loss_and_accuracy(model, examples: list[tuple[list[int], list[int]]]) -> tuple[float, float]:
    """Over completions alone, an example at a time."""
    total = hits = count = 0
    for prompt, completion in examples:
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        total += F.cross_entropy(logits, torch.tensor(completion), reduction="sum").item()
        hits += (logits.argmax(-1) == torch.tensor(completion)).sum().item()
        count += len(completion)
    return total / count, hits / count


def test_what_it_reports_is_what_transformers_and_peft_find(tuned, finished_run, examples):
    base = AutoModelForCausalLM.from_pretrained(finished_run / "export", dtype=torch.float32)
    pieces = held_out(examples, AutoTokenizer.from_pretrained(finished_run / "export"))
    first, *_, last = evaluations(tuned)
    assert (first["step"], last["step"]) == (0, 24)
    loss, accuracy = loss_and_accuracy(base, pieces)
    assert (first["eval_loss"], first["eval_accuracy"]) == pytest.approx((loss, accuracy), rel=1e-5)
    adapted = peft.PeftModel.from_pretrained(base, tuned / "adapter")
    loss, accuracy = loss_and_accuracy(adapted, pieces)
    assert (last["eval_loss"], last["eval_accuracy"]) == pytest.approx((loss, accuracy), rel=1e-5)
    merged = AutoModelForCausalLM.from_pretrained(tuned / "export", dtype=torch.float32)
    assert loss_and_accuracy(merged, pieces)[0] == pytest.approx(loss, rel=1e-5)
    # It has learnt the task.
    assert last["eval_loss"] < 0.5 * first["eval_loss"] and last["eval_accuracy"] > first["eval_accuracy"]


def test_the_samples_are_those_of_generate(tuned):
    samples = [json.loads(line) for line in (tuned / "samples.jsonl").read_text().splitlines()]
    assert [(s["step"], s["prompt"]) for s in samples] == [
        (step, prompt) for step in (0, 6, 12, 18, 24) for prompt in ("he was", "it is")
    ]
    model = AutoModelForCausalLM.from_pretrained(tuned / "export", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tuned / "export")
    for sample in samples[-2:]:
        inputs = tokenizer(sample["prompt"], return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=48, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert sample["completion"] == tokenizer.decode(tokens, skip_special_tokens=True)
    assert (samples[-2]["completion"], samples[-1]["completion"]) == (PAIRS[0][1], PAIRS[1][1])


def test_mfu_counts_frozen_weights_twice(tuned):
    counter = FlopCounter(preset("gemma-test").replace(vocab_size=VOCAB_SIZE), SEQ_LEN, 4)
    full = FlopCounter(preset("gemma-test").replace(vocab_size=VOCAB_SIZE), SEQ_LEN)
    assert counter.per_token() < 0.8 * full.per_token()
    before = 0
    for record in (r for r in read_metrics(tuned / "metrics.jsonl") if "loss" in r):
        rate = record["tokens_per_second_per_chip"]
        assert rate == pytest.approx(4 * SEQ_LEN / record["step_time"], rel=1e-9)
        assert record["mfu"] == pytest.approx(rate * counter.per_token() / CHIPS["v5e"].peak_flops.value, rel=1e-9)
        trained, before = record["tokens"] - before, record["tokens"]
        assert record["trained_tokens_per_second_per_chip"] == pytest.approx(trained / record["step_time"], rel=1e-9)
        assert trained / (4 * SEQ_LEN) < record["real_token_fraction"] <= 1


def test_checkpoints_hold_adapters_alone(tuned):
    folder = complete(tuned / "checkpoints")[-1]
    names = CheckpointReader(folder).names()
    assert names and all(".lora_" in name for name in names)
    assert len(names) == 3 * 2 * 7 * preset("gemma-test").num_hidden_layers


def test_a_tuned_run_can_be_tuned_in_full(tuned, given, tiny_config, tmp_path):
    """From the merged weights; everything is trained."""
    config = tiny_config(tmp_path / "run", *given, "lora=null", f"model={{init_from: {tuned}}}", "train.steps=1")
    trainer = fit(config.model_copy(update={"eval": config.eval.model_copy(update={"at_start": True})}))
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
    assert evaluations(tmp_path / "run")[0]["eval_loss"] == pytest.approx(evaluations(tuned)[-1]["eval_loss"], rel=1e-5)


def test_epochs_become_steps(given, tiny_config, tmp_path):
    given = [*given, "train.steps=null", "train.epochs=2", "data.seq_len=64"]
    with Run(tiny_config(tmp_path / "b", *given, "data.packing=false")) as run:
        # Twice 50 examples in rows of their own, 4 of them a step.
        assert run.config.train.steps == 25
    trainer = fit(tiny_config(tmp_path / "a", *given))
    assert trainer.step <= 25 // 2
    finished = [sum(lane["cursors"]) for lane in trainer.train_loader.state_dict()["lanes"].values()]
    # Each lane has had its part of both epochs, and none has had much more.
    assert all(25 - 1 <= count <= 25 + 4 for count in finished)


def test_chats_are_prompted_as_they_are_trained(given, examples, tiny_config, tmp_path):
    data = f"data={{train: {examples}/chats.jsonl, eval_fraction: 0, seq_len: {SEQ_LEN}, chat_template: gemma}}"
    settings = [*given, data, f"data.eval={examples}/chats.jsonl", "train.steps=60", "eval.prompts=[he was]"]
    main(tiny_config(tmp_path / "run", *settings, "lora.rank=16"))
    sample = json.loads((tmp_path / "run" / "samples.jsonl").read_text().splitlines()[-1])
    assert sample["completion"] == PAIRS[0][1].strip()
    template = AutoTokenizer.from_pretrained(tmp_path / "run" / "adapter").chat_template
    assert "<start_of_turn>" in template
    # What ends an answer is known to whoever generates.
    model, tokenizer, ends = open_model(tmp_path / "run" / "adapter")
    assert ends == tokenizer.convert_tokens_to_ids(["<eos>", "<end_of_turn>"])
    answer = stream(model, tokenizer, "he was", chat=True, eos_token_id=ends, max_new_tokens=40)
    assert "".join(answer) == sample["completion"]
    exported = GenerationConfig.from_pretrained(export_run(tmp_path / "run", tmp_path / "merged", merge=True))
    assert exported.eos_token_id == ends


# Stopping, and keeping the best.


def test_the_best_checkpoint_is_kept_and_exported(given, tiny_config, tmp_path, capsys):
    """With a learning rate so low that nothing is better than the first."""
    worse = ["train.optimizer.lr=1e-12", "checkpoint.keep_last=1", "checkpoint.keep_best=true", "eval.at_start=true"]
    main(tiny_config(tmp_path / "run", *given, *worse, "eval.every=2", "export.verify=true"))
    lowest = best([r for r in evaluations(tmp_path / "run") if r["step"]])
    kept = [int(folder.name[5:]) for folder in complete(tmp_path / "run" / "checkpoints")]
    assert kept == sorted({lowest["step"], 24})
    assert lowest["step"] < 24
    said = capsys.readouterr().out
    assert f"Exporting step {lowest['step']}, which has the lowest held-out loss: " in said
    assert "(no better than before training)" in said


def test_training_stops_when_it_no_longer_helps_and_stays_stopped(given, tiny_config, tmp_path, capsys):
    settings = [*given, "train.optimizer.lr=1e-12", "eval.every=2", "eval.early_stopping_patience=2"]
    trainer = fit(tiny_config(tmp_path / "run", *settings))
    losses = [r["eval_loss"] for r in evaluations(tmp_path / "run")]
    assert trainer.step < 24 and min(losses) == losses[-3] and trainer.step == 2 * len(losses)
    assert "training ends (eval.early_stopping_patience)" in capsys.readouterr().out
    assert read_state(complete(tmp_path / "run" / "checkpoints")[-1])["step"] == trainer.step
    assert fit(tiny_config(tmp_path / "run", *settings)).step == trainer.step


def test_patience_counts_evaluations_since_the_lowest():
    def after(*losses: float) -> list[dict]:
        return [{"step": i, "eval_loss": loss} for i, loss in enumerate(losses)]

    assert not is_stale(after(3, 2, 2.5), 2) and is_stale(after(3, 2, 2.5, 2), 2)
    assert not is_stale(after(3, 4, 5), None) and not is_stale([], 1)


# Resuming.


@pytest.mark.parametrize("extra", [["lora={rank: 4, dropout: 0.3}"], ["lora=null"]], ids=["adapters", "full"])
def test_a_killed_run_ends_with_the_same_bits(given, extra, tiny_file, tiny_config, tmp_path):
    settings = [*given, *extra, "export.at_end=false", "train.grad_accum=2"]
    fit(tiny_config(tmp_path / "undisturbed", *settings))
    folder, kills = tmp_path / "run", 0
    for until in (3, 9, 16):
        process = runs.start(arguments(tiny_file(folder), *settings), tmp_path / "log")
        wait_for_steps(folder, until, process)
        time.sleep(random.Random(until).random() * 0.05)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
    assert kills >= 2
    fit(tiny_config(folder, *settings))
    assert_undisturbed(folder, tmp_path / "undisturbed")


def test_another_base_is_refused(given, tiny_config, finished_run, tuned, tmp_path):
    fit(tiny_config(tmp_path / "run", *given, "train.steps=3"))
    other = [*given, f"model={{init_from: {tuned}/export}}"]
    with pytest.raises(UserError, match=r"has changed in what decides the results: model.init_from \("):
        Run(tiny_config(tmp_path / "run", *other))
    with pytest.raises(UserError, match="no longer holds the weights that its adapter was trained beside"):
        Run(tiny_config(tmp_path / "run", *other, "checkpoint.accept_changes=[model.init_from]"))


def test_a_run_of_ours_opens_as_the_model_it_made(tuned):
    merged = AutoModelForCausalLM.from_pretrained(tuned / "export", dtype=torch.float32).state_dict()
    opened = open_weights(tuned)
    for name in opened.reader.names():
        assert torch.allclose(opened.reader.read(name).float(), merged[name], atol=1e-6), name
    assert untimed(tuned)
