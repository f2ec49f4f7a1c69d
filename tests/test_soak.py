"""The soak in short, and that it finds what it looks for."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from tqdm import tqdm

from gemma_xla.errors import UserError
from tests import runs
from tests.test_resume import arguments
from tests.test_trainer import fit

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
import soak  # noqa: E402
from soak import resume  # noqa: E402
from soak_figures import Figures, differing_bits, growth  # noqa: E402
from soak_interruptions import INTERRUPTIONS, Ended, cut, delete, flip  # noqa: E402
from soak_run import Failed, Sample, SoakedRun  # noqa: E402

SETTINGS = ["checkpoint.every=4", "eval.every=25", "export.at_end=false"]


class Forked:
    """A process of `runs.start`, as `subprocess.Popen` would show it."""

    def __init__(self, process: multiprocessing.Process) -> None:
        self.pid = process.pid
        self._process = process

    def poll(self) -> int | None:
        return self._process.exitcode


def forked(given: list[str], log: Path) -> Forked:
    return Forked(runs.start(given, log))


def test_a_run_survives_every_interruption(tiny_file, tmp_path, capsys):
    folder, kinds = tmp_path / "soak", len(INTERRUPTIONS)
    given = [*arguments(tiny_file(folder), *SETTINGS), "--folder", str(folder)]
    code = soak.main([*given, "--steps", "140", "--interruptions", str(kinds)], forked)
    said = capsys.readouterr().out
    assert code == 0, said
    *progress, survived, lost, bits, memory, handles, threads = said.splitlines()
    assert len(progress) == kinds
    assert survived.startswith(f"interruptions survived: {kinds} of {kinds}: 1 ")
    assert all(f"1 {kind}" in survived for kind in INTERRUPTIONS)
    # Whatever is killed loses something, most of all where the newest checkpoint is damaged.
    assert 0 < int(lost.split()[2].rstrip(":")) <= 5 * 3 * 4
    assert int(bits.split()[4].replace(",", "")) > 5e6
    assert bits.strip().startswith("bits differing: 0 of ")
    assert float(memory.split()[2].rstrip("%")) <= 2
    assert (handles.split(), threads.split()) == (["file", "handles", "leaked:", "0"], ["threads", "leaked:", "0"])


@pytest.mark.slow
def test_the_quickstart_survives_on_four_devices(tmp_path):
    folder = tmp_path / "soak"
    given = ["--steps", "60", "--interruptions", "3", "--seed", "3", "--folder", str(folder)]
    given += ["--set", "checkpoint.every=4", "--set", "eval.every=8", "--set", "eval.batches=2"]
    command = [sys.executable, "benchmarks/soak.py", *given]
    # What `runs` has decided is not for this one.
    environment = {name: value for name, value in os.environ.items() if name != "USE_TORCH_XLA"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "interruptions survived: 3 of 3: 1 " in done.stdout
    assert "bits differing: 0 of " in done.stdout
    described = json.loads((folder / "interrupted" / "environment.json").read_text())
    assert (described["backend"], described["devices"]) == ("xla", 4)


# It finds what it looks for.


def test_other_bits_are_counted(tiny_config, tmp_path):
    for name, rate in (("one", 0.01), ("same", 0.01), ("other", 0.02)):
        fit(tiny_config(tmp_path / name, "train.steps=2", f"train.optimizer.lr={rate}"))
    same, total = differing_bits(tmp_path / "one", tmp_path / "same")
    other, _ = differing_bits(tmp_path / "one", tmp_path / "other")
    assert same == 0 < other < total


def test_a_checkpoint_that_is_wrongly_continued_is_a_failure(monkeypatch, tmp_path):
    run = SoakedRun(forked, [], tmp_path / "run", every=6, bar=None)
    monkeypatch.setattr(run, "resume", lambda: 12)
    assert resume(run, "killed", Ended(reported=15, left=12, allowed=6)) == 3
    with pytest.raises(Failed, match="killed after step 25: the run continues from step 12; the newest whole"):
        resume(run, "killed", Ended(reported=25, left=18, allowed=6))
    with pytest.raises(Failed, match="at most 6 steps may be lost"):
        resume(run, "killed", Ended(reported=19, left=12, allowed=6))


def test_a_run_that_ends_with_an_error_fails_the_soak(tiny_file, tmp_path, capsys):
    folder = tmp_path / "soak"
    given = [*arguments(tiny_file(folder), *SETTINGS, "data.train=/nowhere.txt"), "--folder", str(folder)]
    assert soak.main([*given, "--steps", "240", "--interruptions", "1"], forked) == 1
    said = capsys.readouterr().out
    assert said.startswith(f"failed: {folder}/reference-001.log: it ended by itself with exit code 2; it ends so:\n")
    assert "there is no file or folder '/nowhere.txt'" in said


def steady(**slopes: float) -> list[Sample]:
    """A process that holds 1 GB, 6 handles and 7 threads at first, and so many more at each of 100 steps."""
    found = []
    for step in range(1, 101):
        # A checkpoint needs more for a while.
        saving = step % 10 < 3
        held = {"rss": 1e9 + 1e8 * saving, "handles": 6 + saving, "threads": 7 + saving}
        more = {name: int(slopes.get(name, 0) * step) for name in held}
        found.append(Sample(time=step, step=step, **{name: int(value) + more[name] for name, value in held.items()}))
    return found


def test_what_grows_is_seen():
    assert growth(steady()) == (0.0, 0, 0)
    assert growth(steady()[::4]) is None
    # The most in each third is 1.142, 1.170, 1.192, the least 1.023, 1.046, 1.073.
    assert growth(steady(rss=1e6))[0] == pytest.approx(2 * (1.192 / 1.170 - 1))
    # The least in each third is 8, 10, 13, the most 11, 14, 16: two more twice.
    assert growth(steady(handles=0.1))[1:] == (4, 0)
    assert growth(steady(threads=0.1))[1:] == (0, 4)
    # A machine so busy that the last part is one long checkpoint; a pool whose last thread comes late.
    for late in range(30, 90, 10):
        busy = [s if s.step < late else s._replace(handles=7, threads=8) for s in steady()]
        assert growth(busy)[1:] == (0, 0)
        warm = [s if s.step < late else s._replace(rss=s.rss + 10**8) for s in steady()]
        assert growth(warm)[0] <= 0


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        ({}, None),
        ({"memory": 0.0199, "handles": -1}, None),
        ({"differing": 1}, "1 bits differ"),
        ({"memory": 0.0201}, "memory grew by more than 2%"),
        ({"handles": 1}, "file handles were leaked"),
        ({"threads": 1}, "threads were leaked"),
        ({"planned": 1}, "not every interruption was survived"),
    ],
)
def test_each_bound_is_kept_or_named(found, problem):
    assert Figures(**found).problems() == ([problem] if problem else [])


# Its parts.


def test_the_plan_follows_from_the_seed():
    plan = soak.make_plan(4500, 20, 30, Random(0))
    assert plan == soak.make_plan(4500, 20, 30, Random(0)) != soak.make_plan(4500, 20, 30, Random(1))
    assert sorted(kind for kind, _ in plan) == sorted(5 * list(INTERRUPTIONS))
    targets = [target for _, target in plan]
    assert all(later - earlier >= 60 for earlier, later in zip(targets, targets[1:], strict=False))
    assert targets[0] >= 20 and targets[-1] <= 4500 - 160


def test_a_plan_needs_steps():
    with pytest.raises(UserError, match="60 steps with a checkpoint every 20 have no room for 1 interruptions"):
        soak.make_plan(60, 20, 1, Random(0))


def test_damage_is_what_it_says(tmp_path):
    file, whole = tmp_path / "file", bytes(range(256)) * 8
    for seed in range(20):
        file.write_bytes(whole)
        flip(file, Random(seed))
        changed = int.from_bytes(file.read_bytes()) ^ int.from_bytes(whole)
        assert (file.stat().st_size, changed.bit_count()) == (len(whole), 1)
        file.write_bytes(whole)
        cut(file, Random(seed))
        assert len(file.read_bytes()) < len(whole) and whole.startswith(file.read_bytes())
    delete(file, Random(0))
    assert not file.exists()


def test_no_process_is_left_behind(tmp_path):
    def sleep(_arguments: list[str], log: Path) -> subprocess.Popen:
        return subprocess.Popen(["sleep", "60"])

    with (
        pytest.raises(KeyboardInterrupt),
        SoakedRun(sleep, [], tmp_path / "run", every=6, bar=tqdm(disable=True)) as run,
    ):
        run.start()
        raise KeyboardInterrupt
    assert run.wait_for_end() == -signal.SIGKILL
