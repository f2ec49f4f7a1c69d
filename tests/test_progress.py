"""How far a run is: lines for a log, at once and now and then; a bar for a terminal."""

from __future__ import annotations

import io
import sys

import pytest

from gemma_xla.train.progress import Progress
from tests.test_metrics import record


class Clock:
    """The time, as a test wants it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def lines_of(seconds: list[float], capsys, heartbeat: float = 60.0, total: int | None = None) -> list[str]:
    """What a log says of steps that take so many seconds."""
    clock = Clock()
    progress = Progress(total or len(seconds), 0, True, heartbeat, clock)
    for step, taken in enumerate(seconds, start=1):
        clock.now += taken
        progress.advance(record(step))
    progress.close()
    out, err = capsys.readouterr()
    assert err == ""
    return out.splitlines()


def test_lines_come_at_first_fast_and_then_at_every_heartbeat(capsys):
    lines = lines_of([1.0] * 1000, capsys)
    steps = [int(line.split()[1].partition("/")[0]) for line in lines]
    assert steps[:8] == [1, 2, 4, 8, 16, 32, 64, 124]
    assert {b - a for a, b in zip(steps[7:-2], steps[8:-1], strict=True)} == {60}
    assert steps[-1] == 1000


def test_a_line_says_what_a_bar_would_and_how_long_is_left(capsys):
    first, *_, last = lines_of([30.0, *[10.0] * 3], capsys, heartbeat=1.0, total=100)
    assert first == "step 1/100: loss 5.000, 1,000 tokens/s/chip, MFU 50.0%, 0.10 s/step, 1 compiled"
    # The first step's 30 s are no measure of the others: 96 steps of 10 s.
    assert last == "step 4/100: loss 1.250, 250 tokens/s/chip, MFU 12.5%, 0.40 s/step, 1 compiled, 0:16:00 left"


def test_slow_steps_have_a_line_each(capsys):
    assert len(lines_of([90.0] * 7, capsys)) == 7


def test_hosts_that_do_not_report_are_silent(capsys):
    progress = Progress(9, 0, False, 1.0)
    progress.advance(record(1))
    progress.say("hello")
    progress.close()
    assert capsys.readouterr() == ("", "")


class Stream(io.StringIO):
    """One that may be a terminal."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.isatty = lambda: terminal


@pytest.mark.parametrize("out", [True, False])
@pytest.mark.parametrize("err", [True, False])
def test_a_bar_needs_a_terminal_on_both_streams(monkeypatch, out, err):
    streams = Stream(out), Stream(err)
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    progress = Progress(2, 0, True, 60.0)
    for step in (1, 2):
        progress.advance(record(step))
    progress.say("hello")
    progress.close()
    shown, bar = (stream.getvalue() for stream in streams)
    assert ("2/2 [" in bar) == (out and err)
    assert ("step 2/2: loss" in shown) == (not (out and err))
    assert "hello\n" in shown
