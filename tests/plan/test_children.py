"""Processes that fail, hang or are left behind."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time

import pytest

from gemma_xla.plan import children
from gemma_xla.plan.children import PlanError, Progress


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Makes a module of some code, and returns its name."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def make(code: str) -> str:
        (tmp_path / "child_of_test.py").write_text(code)
        return "child_of_test"

    return make


def run(name: str, timeout: float = 60.0) -> str:
    stream = io.StringIO()
    children.run(name, ["1"], "compile", Progress(stream), timeout)
    return stream.getvalue()


def test_a_stage_is_reported_with_its_time(module):
    assert run(module("")) == "compile 0 s\n"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("print('so far so good'); raise ValueError('odd')", "failed with exit code 1: ValueError: odd$"),
        ("import os; os.abort()", "ended with signal SIGABRT: "),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL .*ran out of memory.*it said nothing"),
        ("raise SystemExit(__import__('os').environ['LIBTPU_INIT_ARGS'])", "--xla_some=1$"),
        ("raise SystemExit('libtpu: lockfile /tmp/libtpu_lockfile')", "which another process has locked"),
    ],
)
def test_a_crash_is_explained(module, monkeypatch, code, message):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_some=1")
    with pytest.raises(PlanError, match=message) as error:
        run(module(code))
    assert error.value.exit_code == 3
    assert "\n" not in str(error.value)


def test_one_that_hangs_is_ended(module, tmp_path):
    started = tmp_path / "pid"
    code = f"import os, time; open({str(started)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    with pytest.raises(PlanError, match="took longer than 3 s and was ended; allow more with --timeout"):
        run(module(code), timeout=3.0)
    assert not alive(int(started.read_text()))


def test_nothing_survives_the_command(module, tmp_path):
    """Even one that is killed without a chance to clean up."""
    started = tmp_path / "pid"
    name = module(
        "import os, signal, time\n"
        "from gemma_xla.interrupts import end_with_parent\n"
        "end_with_parent(signal.SIGKILL)\n"
        f"open({str(started)!r}, 'w').write(str(os.getpid()))\n"
        "time.sleep(600)\n"
    )
    code = (
        "import sys; from gemma_xla.plan import children\n"
        f"children.run({name!r}, [], 'compile', children.Progress(sys.stderr), 600)"
    )
    command = subprocess.Popen([sys.executable, "-c", code])
    wait(lambda: started.exists() and started.read_text())
    command.send_signal(signal.SIGKILL)
    command.wait()
    wait(lambda: not alive(int(started.read_text())))


def wait(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie that nobody has waited for yet has ended, too.
    with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
        return file.read().rpartition(")")[2].split()[0] != "Z"


def test_what_is_wrong_here_ends_it(module, tmp_path):
    started = tmp_path / "pid"
    name = module(f"import os, time; open({str(started)!r}, 'w').write(str(os.getpid())); time.sleep(600)")

    def wrong() -> None:
        while not (started.exists() and started.read_text()):
            time.sleep(0.01)
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        children.run(name, ["1"], "trace", Progress(io.StringIO()), 60.0, wrong)
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)
