"""A run that is started again and again, each time as a process of its own that is watched from outside."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import psutil
from tqdm import tqdm

from gemma_xla.interrupts import PREEMPTED

ROOT = Path(__file__).parents[1]
# Seconds between two looks at a process.
PAUSE = 0.02
# Seconds without a new step, or an end that was asked for, after which a process counts as stuck.
PATIENCE = 600
# Longer than a line of metrics.jsonl.
_TAIL = 4096


class Failed(Exception):
    """A run did what no interruption may make it do; nothing after it can be judged."""


class Process(Protocol):
    """What is needed of `subprocess.Popen`."""

    pid: int

    def poll(self) -> int | None: ...


# Starts the recipe with arguments; what it prints goes to a file.
Start = Callable[[list[str], Path], Process]


class Sample(NamedTuple):
    """What a process held when ``step`` was the last one reported; seconds and bytes."""

    time: float
    step: int
    rss: int
    handles: int
    threads: int


def launch(arguments: list[str], log: Path, **environment: str) -> Process:
    """Start recipes/pretrain.py."""
    command = [sys.executable, "recipes/pretrain.py", *arguments]
    with log.open("w") as file:
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, stdout=file, stderr=file)


class SoakedRun:
    """One output folder and the processes that write to it, one after the other.

    Use it as a context manager: no process is left behind.
    """

    def __init__(self, start: Start, arguments: list[str], folder: Path, every: int, bar: tqdm) -> None:
        """
        Args:
            start: how to start a process.
            arguments: those of the recipe, without the output folder.
            folder: becomes the output folder; logs are written beside it.
            every: steps between checkpoints.
            bar: shows the last step.
        """
        self.folder, self.checkpoints = folder, folder / "checkpoints"
        self.every = every
        # Of each process.
        self.samples: list[list[Sample]] = []
        # What a start takes until the run goes on, in seconds.
        self.start_seconds = 0.0
        self._start = start
        self._arguments = [*arguments, "--set", f"output_dir={folder}"]
        self._bar = bar
        self._process: Process | None = None

    def __enter__(self) -> SoakedRun:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.poll() is None:
            os.kill(self._process.pid, signal.SIGKILL)
            self._moved = time.monotonic()
            self.wait_for_end()

    @property
    def log(self) -> Path:
        """What the latest process prints."""
        return self.folder.with_name(f"{self.folder.name}-{len(self.samples):03d}.log")

    @property
    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    @property
    def step(self) -> int:
        """The last step reported."""
        with contextlib.suppress(FileNotFoundError), (self.folder / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            # What follows the last line's end may be half of the next.
            if whole := file.read().split(b"\n")[:-1]:
                return json.loads(whole[-1])["step"]
        return 0

    @property
    def step_seconds(self) -> float:
        """What a step of the latest process takes."""
        first, last = self.samples[-1][0], self.samples[-1][-1]
        return (last.time - first.time) / max(1, last.step - first.step)

    def start(self) -> None:
        """Start the next process."""
        self.samples.append([])
        self.log.touch()
        self._process = self._start(self._arguments, self.log)
        self._watched = psutil.Process(self._process.pid)
        self._started = self._moved = time.monotonic()
        self._seen = 0

    def resume(self, *said: str) -> int:
        """Start the next process; return the step it continues from once it has printed that and ``said``.

        Raises:
            Failed: it never does.
        """
        self.start()
        found: list[int] = []

        def told() -> bool:
            text = self.text
            found[:] = [int(step) for step in re.findall(r"Continuing from step (\d+)", text)]
            return bool(found) and all(phrase in text for phrase in said)

        self.wait_until(told)
        self.start_seconds = time.monotonic() - self._started
        return found[0]

    def end(self, number: signal.Signals) -> int:
        """Send the latest process SIGKILL or SIGTERM; return the last step reported once it has ended.

        Raises:
            Failed: it ended otherwise than by that.
        """
        if self._process.poll() is None:
            os.kill(self._process.pid, number)
        self._moved = time.monotonic()
        expected = PREEMPTED if number == signal.SIGTERM else -number
        if (code := self.wait_for_end()) != expected:
            raise self._failed(f"its exit code after {number.name} is {code}, not {expected}")
        return self.step

    def wait_until(self, condition: Callable[[], bool], pause: float = PAUSE) -> None:
        """
        Raises:
            Failed: the process ends first, or is stuck.
        """
        while not condition():
            if (code := self._process.poll()) is not None:
                raise self._failed(f"it ended by itself with exit code {code}")
            self._look(pause)

    def wait_until_done(self) -> None:
        """
        Raises:
            Failed: the latest process does not end well.
        """
        if code := self.wait_for_end():
            raise self._failed(f"it ended by itself with exit code {code}")

    def wait_for_end(self) -> int:
        """Return the exit code of the latest process."""
        while (code := self._process.poll()) is None:
            self._look(PAUSE)
        return code

    @contextlib.contextmanager
    def full_disk(self, room: int) -> Iterator[None]:
        """Have each write of the latest process fail beyond the first ``room`` bytes of a file, as on a full disk."""
        self._watched.rlimit(psutil.RLIMIT_FSIZE, (room, psutil.RLIM_INFINITY))
        yield
        self._watched.rlimit(psutil.RLIMIT_FSIZE, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))

    def _look(self, pause: float) -> None:
        """Note what the process holds, then wait a little."""
        now, step, samples = time.monotonic(), self.step, self.samples[-1]
        if samples and step < samples[-1].step:
            # Until now this was the last step of the process before.
            samples.clear()
        with contextlib.suppress(psutil.Error), self._watched.oneshot():
            memory, handles = self._watched.memory_info().rss, self._watched.num_fds()
            samples.append(Sample(now, step, memory, handles, self._watched.num_threads()))
        if step != self._seen:
            self.start_seconds = self.start_seconds or now - self._started
            self._moved, self._seen = now, step
            self._bar.update(step - self._bar.n)
        if now > self._moved + PATIENCE:
            raise self._failed(f"nothing has happened for {PATIENCE} s after step {step}")
        time.sleep(pause)

    def _failed(self, what: str) -> Failed:
        end = "\n".join(self.text.splitlines()[-5:])
        return Failed(f"{self.log}: {what}; it ends so:\n{end}")
