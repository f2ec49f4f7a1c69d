"""The whole quickstart as a user starts it, and the same recipe with and without torch_xla."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "recipes/configs/quickstart.yaml"


def _launch(folder: Path, *overrides: str, **environment: str) -> str:
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "recipes/pretrain.py"]
    command += ["--config", str(CONFIG), "--set", f"output_dir={folder}"]
    for override in overrides:
        command += ["--set", override]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def _steps(folder: Path) -> list[dict[str, float]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "loss" in record]


@pytest.mark.slow
def test_the_quickstart_learns_and_ends_with_a_model_that_transformers_loads(tmp_path):
    folder = tmp_path / "run"
    printed = _launch(folder)
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
