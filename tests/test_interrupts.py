"""Signals: a clean end at once or at the next step, and an immediate one when asked twice. Each in its own process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from gemma_xla import interrupts

# Says when it is ready, then does what the case asks for.
SCRIPT = """
import sys, time
from gemma_xla import interrupts
from gemma_xla.cli import _guarded

def at_once():
    print("ready", flush=True)
    time.sleep(30)

def deferred():
    with interrupts.deferred():
        print("ready", flush=True)
        while not interrupts.received():
            time.sleep(0.01)
        print("step done", flush=True)
        raise interrupts.Interrupted(interrupts.received())

def saving():
    with interrupts.deferred():
        print("ready", flush=True)
        while not interrupts.received():
            time.sleep(0.01)
        time.sleep(float(sys.argv[2]))
        print("saved", flush=True)
        raise interrupts.Interrupted(interrupts.received())

def never():
    with interrupts.deferred():
        print("ready", flush=True)
        time.sleep(1)
        while True:
            time.sleep(30)

try:
    _guarded(globals()[sys.argv[1]], debug=False)
finally:
    print("cleaned up", flush=True)
"""


def start(case: str, **environment: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, case],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
@pytest.mark.parametrize("case", ["at_once", "deferred"])
def test_one_signal_is_a_clean_end(case, number, code):
    process = start(case)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert out == ("step done\n" if case == "deferred" else "") + "cleaned up\n"
    assert err == f"interrupted by {number.name}\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_the_second_of_its_kind_ends_at_once(number, code):
    process = start("never")
    process.send_signal(number)
    assert "Ending cleanly" in process.stderr.readline() + process.stderr.readline()
    # Not of the same kind: a launcher that was stopped with Ctrl-C takes its child along with SIGTERM.
    process.send_signal({signal.SIGINT: signal.SIGTERM, signal.SIGTERM: signal.SIGINT}[number])
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(number)
    out, _ = process.communicate(timeout=20)
    assert (process.returncode, out) == (code, "")


def test_a_child_of_accelerate_does_not_outlive_it():
    launcher = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], "deferred"], stdout=subprocess.PIPE, text=True)
print(child.stdout.readline(), end="", flush=True)
child.wait()
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", launcher, SCRIPT],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"ACCELERATE_MIXED_PRECISION": "no"},
    )
    assert parent.stdout.readline() == "ready\n"
    (child,) = psutil.Process(parent.pid).children()
    parent.kill()
    parent.wait()
    psutil.wait_procs([child], timeout=20)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"


def launched(seconds: int) -> subprocess.Popen:
    """A launcher of a run that takes so long to save, in a group of their own."""
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, SCRIPT, "saving", str(seconds)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"ACCELERATE_MIXED_PRECISION": "no"},
        start_new_session=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_group_told_to_end_saves():
    """A machine that is taken back, systemd and Slurm tell launcher and run alike: the run hears it twice."""
    for process in [launched(1) for _ in range(4)]:
        os.killpg(process.pid, signal.SIGTERM)
        assert process.communicate(timeout=20)[0] == "saved\ncleaned up\n"


def test_told_again_and_again_it_ends_at_once():
    process = launched(30)
    (run,) = psutil.Process(process.pid).children()
    os.killpg(process.pid, signal.SIGTERM)
    for _ in range(2):
        time.sleep(0.5)
        run.send_signal(signal.SIGTERM)
    psutil.wait_procs([run], timeout=10)
    assert not run.is_running()
    assert process.communicate()[0] == ""


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with interrupts.handled():
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(-1) == -1
