"""What a run that stands still says, and how it is ended, with limits of a fraction of a second."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from upath import UPath

from gemma_xla.config_watch import WatchSection
from gemma_xla.train.watchdog import HUNG, Watchdog

ROOT = Path(__file__).parents[1]


class Watched:
    """A watchdog that notes what it says, and that it ends the process."""

    def __init__(self, path: Path, **section: float) -> None:
        self.said: list[str] = []
        self.codes: list[int] = []
        self.dog = Watchdog(WatchSection(**section), path, self.said.append, self.codes.append)

    def wait(self, seconds: float) -> bool:
        """Whether it ends the process within so many seconds."""
        until = time.monotonic() + seconds
        while not self.codes and time.monotonic() < until:
            time.sleep(0.01)
        return bool(self.codes)

    def take_steps(self, count: int, seconds: float = 0.01) -> None:
        for number in range(1, count + 1):
            self.dog.step(number)
            self.dog.took(seconds)


@pytest.fixture
def watch(tmp_path):
    """Makes one with limits of a fraction of a second."""
    made = []

    def make(path: Path = tmp_path / "hang-0.txt", **section: float) -> Watched:
        made.append(Watched(path, **{"hang_floor": 0.4, "hang_limit": 3.0, "heartbeat": 0.1, **section}))
        return made[-1]

    yield make
    for one in made:
        one.dog.close()


def test_a_step_that_hangs_ends_the_process_and_shows_where(watch, tmp_path, capfd):
    watched = watch()
    watched.take_steps(9)
    watched.dog.step(10)
    assert watched.wait(20)
    assert watched.codes == [HUNG]
    text, err = (tmp_path / "hang-0.txt").read_text(), capfd.readouterr().err
    for shown in (text, err):
        assert "hung: waiting for step 10, " in shown
        assert "usual step 0.01 s, more than 0 s (watch.hang_floor)" in shown
        # The very line where this thread waits.
        assert re.search(r'test_watchdog.py", line \d+ in wait\n', shown)
    assert err.rstrip().endswith("start again to continue from it (exit code 4)")
    assert str(tmp_path / "hang-0.txt") in err


def test_a_folder_that_is_not_there_keeps_nothing_from_ending(watch, tmp_path, capfd):
    watched = watch(path=tmp_path / "not there" / "hang-0.txt", hang_limit=0.4)
    watched.dog.doing("preparing the run")
    assert watched.wait(20)
    err = capfd.readouterr().err
    assert "error: hung: preparing the run, " in err and "are above. What was saved is whole" in err


def test_stacks_go_to_a_bucket(watch, tmp_path):
    bucket = UPath(f"memory://{tmp_path}/run/hang-3.txt")
    watched = watch(path=bucket)
    watched.take_steps(5)
    assert watched.wait(20)
    assert "hung: waiting for step 5" in bucket.read_text()


def test_the_usual_time_times_the_factor_counts_where_it_is_more(watch):
    watched = watch(hang_factor=10)
    watched.take_steps(7, seconds=0.1)
    assert not watched.wait(0.75)
    assert watched.wait(20)


def test_steps_on_their_way_are_left_alone(watch):
    watched = watch(heartbeat=30)
    for _ in range(8):
        watched.take_steps(5)
        assert not watched.wait(0.1)
    assert watched.said == []


@pytest.mark.parametrize("case", ["first steps", "evaluating", "compiling"])
def test_what_has_no_usual_time_has_longer(watch, case):
    watched = watch(hang_limit=1.0)
    watched.take_steps(4 if case == "first steps" else 20)
    if case == "evaluating":
        watched.dog.doing("evaluating after step 20")
    if case == "compiling":
        watched.dog.step(21)
        watched.dog.compiles = lambda: 1
    assert not watched.wait(0.8)
    assert watched.wait(20)
    # The same again, with a sign of life now and then.
    watched = watch(hang_limit=1.0)
    watched.dog.doing("evaluating after step 20")
    for _ in range(3):
        assert not watched.wait(0.6)
        watched.dog.progress()


def test_a_compilation_counts_for_its_own_step_alone(watch):
    watched = watch()
    watched.take_steps(9)
    watched.dog.compiles = lambda: 1
    watched.dog.step(10)
    assert watched.wait(20)


def test_it_can_be_turned_off(watch):
    watched = watch(hang_factor=0, hang_limit=0.4)
    watched.take_steps(9)
    assert not watched.wait(1.5)
    assert len(watched.said) > 3


def test_a_log_is_never_silent_for_long(watch):
    watched = watch(hang_limit=30, hang_floor=30)
    watched.dog.doing("evaluating after step 50")
    began = time.monotonic()
    while len(watched.said) < 3 and time.monotonic() < began + 20:
        time.sleep(0.01)
    assert time.monotonic() - began > 0.3
    assert watched.said[0] == "still evaluating after step 50, 0 s"
    watched.take_steps(9, seconds=0.3)
    watched.dog.step(10)
    began = time.monotonic()
    while "step 10" not in watched.said[-1] and time.monotonic() < began + 20:
        time.sleep(0.01)
    # Not before a step takes twice as long as usual.
    assert time.monotonic() - began > 0.6
    assert watched.said[-1] == "still waiting for step 10, 1 s; usual step 0.3 s"


def test_a_voice_that_fails_is_no_end_of_watching(watch):
    watched = watch()

    def fails(_text):
        raise OSError("full")

    watched.dog.say = fails
    watched.take_steps(9)
    assert watched.wait(20)


# Processes of their own.

SCRIPT = """
import ctypes, sys, time
from pathlib import Path
from gemma_xla.config_watch import WatchSection
from gemma_xla.train.watchdog import Watchdog

limit = float(sys.argv[2])
dog = Watchdog(WatchSection(hang_floor=0.5, hang_limit=limit, heartbeat=60), Path(sys.argv[1]), print)
for number in range(9):
    dog.step(number)
    dog.took(0.01)

def sleeping():
    time.sleep(60)

def holding_the_lock():
    ctypes.PyDLL(None).sleep(60)

print("ready", flush=True)
globals()[sys.argv[3]]()
"""


def start(path: Path, limit: float, what: str) -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT, str(path), str(limit), what]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "ready\n"
    return process


def test_the_process_ends_with_its_own_code(tmp_path):
    process = start(tmp_path / "hang", 60, "sleeping")
    _, err = process.communicate(timeout=20)
    assert process.returncode == HUNG == 4
    assert "in sleeping\n" in err and "error: hung: waiting for step 8" in err
    assert "in sleeping\n" in (tmp_path / "hang").read_text()


def test_what_holds_pythons_lock_is_ended_too(tmp_path):
    process = start(tmp_path / "hang", 2, "holding_the_lock")
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "Timeout (0:00:02)!" in err and "in holding_the_lock\n" in err


def test_a_process_that_was_stopped_has_not_hung(tmp_path):
    process = start(tmp_path / "hang", 60, "sleeping")
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(2.0)
    os.kill(process.pid, signal.SIGCONT)
    time.sleep(0.1)
    assert process.poll() is None
    process.communicate(timeout=20)
    assert process.returncode == HUNG


def test_nothing_is_expected_between_two_things(watch):
    watched = watch(hang_limit=0.4)
    with watched.dog.during("preparing the run"):
        watched.dog.progress()
    assert not watched.wait(1.5)
    assert watched.said == []
    with pytest.raises(ValueError), watched.dog.during("exporting"):
        raise ValueError
    assert not watched.wait(1.0)
    watched.dog.doing("exporting")
    assert watched.wait(20)


def test_closing_ends_the_thread_and_the_timer(watch):
    watched = watch(hang_limit=0.5)
    watched.dog.close()
    time.sleep(1.5)  # this process would not outlive the timer
    assert watched.codes == [] and not watched.dog._thread.is_alive()


COMPILING = """
import threading, time, torch
from gemma_xla.config import MeshSection
from gemma_xla.xla import open_backend

backend = open_backend(MeshSection(virtual_devices=1), use_xla=True)
seen, late = set(), []

def look():
    before = time.monotonic()
    while True:
        time.sleep(0.01)
        seen.add((backend.compilations_begun(), backend.compilations()))
        late.append(time.monotonic() - before)
        before = time.monotonic()

threading.Thread(target=look, daemon=True).start()
weights = torch.randn(300, 300).to(backend.device)
x = weights
for _ in range(60):
    x = torch.tanh(x @ weights).sort(dim=-1)[0]
began = time.monotonic()
late.clear()
backend.flush()
x.sum().item()
print(time.monotonic() - began, max(late), any(begun > done for begun, done in seen))
"""


@pytest.mark.xla
def test_a_compilation_is_seen_while_it_lasts():
    done = subprocess.run([sys.executable, "-c", COMPILING], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    whole, late, seen = done.stdout.split()[-3:]
    # The thread that looks is not kept from running: Python's lock is free meanwhile.
    assert float(late) < 0.5 * float(whole)
    assert seen == "True"
