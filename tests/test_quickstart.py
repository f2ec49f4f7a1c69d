"""The whole quickstart as a user starts it, and the same recipe with and without torch_xla."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "recipes/configs/quickstart.yaml"
FINETUNE = ROOT / "recipes/configs/gemma-tiny-lora-cpu.yaml"


def _launch(
    folder: Path, *overrides: str, recipe: str = "pretrain.py", config: Path = CONFIG, **environment: str
) -> str:
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", f"recipes/{recipe}"]
    command += ["--config", str(config), "--set", f"output_dir={folder}"]
    for override in overrides:
        command += ["--set", override]
    # What other tests have decided for their runs is not for these.
    inherited = {name: value for name, value in os.environ.items() if name != "USE_TORCH_XLA"}
    done = subprocess.run(command, cwd=ROOT, env=inherited | environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def _steps(folder: Path) -> list[dict[str, float]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "loss" in record]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory) -> tuple[Path, str]:
    """The folder of the quickstart, and what it printed."""
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    return folder, _launch(folder)


@pytest.mark.slow
def test_the_quickstart_learns_and_ends_with_a_model_that_transformers_loads(quickstart):
    folder, printed = quickstart
    steps = _steps(folder)
    vocabulary = AutoTokenizer.from_pretrained(folder / "export").vocab_size
    # A tied embedding begins a little above: it expects the token it was given once more.
    assert steps[0]["loss"] == pytest.approx(math.log(vocabulary), rel=0.2)
    last = [record["loss"] for record in steps[-20:]]
    assert sum(last) / len(last) < math.log(vocabulary) / 2
    assert steps[-1]["compilations"] <= 2, "one graph for the step, one for the evaluation"
    for name in ("config.yaml", "metrics.jsonl", "tensorboard", "curves.png", "tokenizer", "checkpoints", "export"):
        assert (folder / name).exists(), name
        assert str(folder / name) in printed
    model = AutoModelForCausalLM.from_pretrained(folder / "export", dtype=torch.float32)
    assert 5e6 < sum(p.numel() for p in model.parameters()) < 15e6
    assert model.config.head_dim * model.config.num_attention_heads != model.config.hidden_size


@pytest.mark.slow
def test_fine_tuning_the_quickstart_teaches_it_a_task(quickstart, tmp_path):
    subprocess.run([sys.executable, "recipes/docstrings.py", str(tmp_path)], cwd=ROOT, check=True)
    data = (f"data.train={tmp_path}/train.jsonl", f"data.eval={tmp_path}/eval.jsonl")
    printed = _launch(
        tmp_path / "run",
        f"model.init_from={quickstart[0]}",
        *data,
        "train.steps=60",
        recipe="finetune.py",
        config=FINETUNE,
    )
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = (record for record in records if "eval_loss" in record)
    assert first["step"] == 0
    assert last["eval_loss"] < first["eval_loss"] - 0.3
    assert last["eval_accuracy"] > first["eval_accuracy"] + 0.08
    assert float(re.search(r"with peft and ours: they differ by at most (\S+)", printed)[1]) < 1e-5
    assert "def read_file(path)" in printed


@pytest.mark.xla
def test_the_recipe_gives_the_same_losses_with_and_without_torch_xla(tmp_path):
    short = ("train.steps=4", "data.eval_fraction=0", "export.at_end=false", "train.batch_size=4", "data.seq_len=64")
    _launch(tmp_path / "xla", *short)
    _launch(tmp_path / "torch", *short, USE_TORCH_XLA="0")
    ours, plain = _steps(tmp_path / "xla"), _steps(tmp_path / "torch")
    assert [s["loss"] for s in ours] == pytest.approx([s["loss"] for s in plain], rel=1e-5)
    assert [s["grad_norm"] for s in ours] == pytest.approx([s["grad_norm"] for s in plain], rel=1e-4)
    assert [s["compilations"] for s in ours] == [1, 1, 1, 1]


@pytest.mark.xla
def test_a_run_on_four_devices_continues_on_two_and_without_torch_xla(tmp_path):
    """Checkpoints belong to no mesh."""
    short = ("data.eval_fraction=0", "export.at_end=false", "train.batch_size=4", "data.seq_len=64")
    constant = ("train.schedule.kind=constant", "train.schedule.warmup_steps=0")
    _launch(tmp_path / "whole", *short, *constant, "train.steps=6", USE_TORCH_XLA="0")
    _launch(tmp_path / "run", *short, *constant, "train.steps=2")
    _launch(tmp_path / "run", *short, *constant, "train.steps=4", "mesh.virtual_devices=2")
    _launch(tmp_path / "run", *short, *constant, "train.steps=6", USE_TORCH_XLA="0")
    expected, steps = _steps(tmp_path / "whole"), _steps(tmp_path / "run")
    assert [s["step"] for s in steps] == [1, 2, 3, 4, 5, 6]
    assert [s["loss"] for s in steps] == pytest.approx([s["loss"] for s in expected], rel=1e-5)
