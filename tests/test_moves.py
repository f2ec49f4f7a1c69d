"""Runs that go on elsewhere: on more devices or fewer, on another mesh, with and without PyTorch/XLA."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gemma_xla.checkpoint import complete, read_state
from gemma_xla.train.metrics import read_metrics
from tests.test_resume import arguments, wait_for_steps
from tests.test_trainer import assert_same_bits, fit, losses, untimed

ROOT = Path(__file__).parents[1]
# Devices along data, fsdp and tensor, or None for plain PyTorch.
PLAIN, ONE, FOUR, EIGHT = None, (1, 1, 1), (1, 4, 1), (2, 2, 2)
MODEL = "model.overrides={vocab_size: 500, max_position_embeddings: 64, num_key_value_heads: 2, num_attention_heads: 4}"


def on(mesh: tuple[int, int, int] | None) -> list[str]:
    if mesh is None:
        return []
    data, fsdp, tensor = mesh
    return [f"mesh={{data: {data}, fsdp: {fsdp}, tensor: {tensor}, virtual_devices: {data * fsdp * tensor}}}"]


def environment(mesh) -> dict[str, str]:
    # Compiling quickly, which is most of the time here.
    quick = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    return os.environ | quick | {"USE_TORCH_XLA": "0" if mesh is None else "1", "PYTHONPATH": str(ROOT)}


def go_on(config: Path, mesh, *overrides: str) -> dict:
    command = [sys.executable, "-m", "tests.mover", str(config), *on(mesh), *overrides]
    done = subprocess.run(command, cwd=ROOT, env=environment(mesh), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.xla
@pytest.mark.parametrize("way", [[EIGHT, FOUR, ONE, PLAIN], [PLAIN, FOUR, EIGHT], [ONE, EIGHT]], ids=str)
def test_a_run_moves_from_mesh_to_mesh(tiny_file, tiny_config, tmp_path, way):
    folder = tmp_path / "run"
    given = ["train.batch_size=8", MODEL]
    for number, mesh in enumerate(way):
        result = go_on(tiny_file(folder), mesh, *given, f"train.steps={2 * number + 2}")
        assert result["devices"] == (1 if mesh is None else mesh[0] * mesh[1] * mesh[2])
        assert result["step"] == 2 * number
        # To the bit, however many parts it was saved in and loaded into.
        assert result["different"] == ([] if number else None)
    fit(tiny_config(tmp_path / "plain", *given, f"train.steps={2 * len(way)}"))
    assert losses(folder) == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


def start(config: Path, mesh, log: Path, *overrides: str, launcher: list[str]) -> subprocess.Popen:
    command = [*launcher, "recipes/pretrain.py", *arguments(config, *on(mesh), *overrides)]
    with log.open("a") as file:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment(mesh), stdout=file, stderr=file, start_new_session=True
        )


def alive(process: subprocess.Popen) -> subprocess.Popen:
    process.is_alive = lambda: process.poll() is None
    return process


GIVEN = ["train.steps=12", "train.batch_size=8", "train.grad_accum=2", "checkpoint.every=2", "eval.every=5"]


@pytest.mark.xla
def test_a_run_on_xla_killed_at_random_ends_with_the_same_bits(tiny_file, tmp_path):
    draw, folder, log = random.Random(2), tmp_path / "run", tmp_path / "log"
    for until in (3, 6, 9):
        process = alive(start(tiny_file(folder), FOUR, log, *GIVEN, launcher=[sys.executable]))
        wait_for_steps(folder, until, process)
        time.sleep(draw.random() * 0.2)
        assert process.poll() is None, log.read_text()[-3000:]
        process.kill()
        process.wait()
    assert "Continuing from step" in log.read_text()
    for name in ("run", "undisturbed"):
        process = start(tiny_file(tmp_path / name), FOUR, log, *GIVEN, launcher=[sys.executable])
        assert process.wait(300) == 0, log.read_text()[-3000:]
    assert_same_bits(folder, tmp_path / "undisturbed")
    ours, theirs = (untimed(tmp_path / name) for name in ("run", "undisturbed"))
    for record in (*ours, *theirs):
        record.pop("compilations", None)  # counted anew in each process
    assert ours == theirs


@pytest.mark.xla
def test_a_launched_run_that_is_preempted_saves_and_goes_on(tiny_file, tmp_path):
    """SIGTERM reaches the launcher, as clouds send it, and through it the run."""
    folder, log = tmp_path / "run", tmp_path / "log"
    launcher = [str(Path(sys.executable).with_name("accelerate")), "launch"]
    given = [*GIVEN, "checkpoint.every=0", "train.steps=2000"]
    process = alive(start(tiny_file(folder), FOUR, log, *given, launcher=launcher))
    wait_for_steps(folder, 3, process)
    os.kill(process.pid, signal.SIGTERM)
    process.wait(60)
    deadline = time.monotonic() + 60
    while not (found := complete(folder / "checkpoints")) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert found, log.read_text()[-3000:]
    last = [r["step"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r][-1]
    assert read_state(found[-1])["step"] == last
    while (folder / ".claim").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert f"SIGTERM: saved at step {last}; start again to continue from there" in log.read_text()
    result = go_on(tiny_file(folder), FOUR, *given, f"train.steps={last + 1}")
    assert (result["step"], result["different"]) == (last, [])
