"""The benchmark of a GPU, tried on a CPU: its contenders take equal steps. What they cost is not looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
import gpu_step  # noqa: E402
from gpu_step import OURS, TINY, Turn, attempt, ours, summarize, theirs  # noqa: E402

from gemma_xla.chips import get_chip  # noqa: E402
from gemma_xla.flops import FlopCounter  # noqa: E402

CPU = torch.device("cpu")


def test_figures():
    case = TINY["2b"]
    turns = {OURS: [Turn(6.0, 1.0, 2**30), Turn(6.0, 2.0, 2**31)], "transformers": [Turn(6.0, 3.0, 0)] * 2}
    summary = summarize(turns, dict.fromkeys(turns, False), case, get_chip("h200"))
    assert summary["transformers"]["ours_is"] == [2.25, 1.5, 3.0]
    assert summary[OURS]["ours_is"] == [1.0, 1.0, 1.0]
    rate = case.rows * case.seq_len / 1.5
    assert summary[OURS]["tokens_per_second"] == rate
    assert summary[OURS]["mfu"] == FlopCounter(case.config, case.seq_len).mfu(rate, get_chip("h200").peak_flops.value)
    assert summary[OURS]["peak_gb"] == 2


def test_a_lack_of_memory_is_no_failure(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setitem(gpu_step.CONTENDERS, OURS, full)
    assert attempt(OURS) is None


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("name", TINY)
def test_contenders_take_equal_steps(name, remat):
    mine = ours(TINY[name], CPU, torch.float32, remat, 1)
    other = theirs(TINY[name], CPU, torch.float32, remat, 1, compiled=False)
    assert mine.first_loss == pytest.approx(other.first_loss, rel=1e-5)
    assert min(mine.seconds, other.seconds) > 0


@pytest.mark.slow
def test_the_whole_program(tmp_path):
    path = tmp_path / "result.json"
    options = ["--tiny", "--only", "transformers", "--rounds", "1", "--steps", "1", "--json", str(path)]
    command = [sys.executable, "benchmarks/gpu_step.py", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "losses of the first step equal: yes"
    assert json.loads(path.read_text()).keys() == TINY.keys()
