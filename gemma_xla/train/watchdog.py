"""Ends a run that no longer moves, and until then says what it is waiting for.

A thread counts the seconds since the run last got on with something. One that never gets to run, because something in C
holds Python's lock, is stood in for by faulthandler's timer, which needs no lock.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import statistics
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from gemma_xla.config_watch import WatchSection
from gemma_xla.storage import copy_file, is_local

# The run hung; started again, it goes on from its newest checkpoint.
HUNG = 4
# Steps whose time is known before there is a usual time, and those that make it up.
_KNOWN, _LATEST = 5, 100
# What an upload of the stacks may take, in seconds: it may be the very thing that hangs.
_UPLOAD = 30


class Activity(NamedTuple):
    """What a run is at."""

    name: str
    # Whether it takes about as long as the steps before.
    is_step: bool = False
    # Compilations begun until then.
    compiled: int = 0


_RESTING = Activity("nothing")


class Limit(NamedTuple):
    """How many seconds an activity may take, and the key of the config that says so."""

    seconds: float
    key: str


class Watchdog:
    """Watches over one process of a run; the run tells it what it begins (`doing`, `step`) and finishes."""

    def __init__(
        self,
        section: WatchSection,
        path: Path,
        say: Callable[[str], None],
        end: Callable[[int], None] = os._exit,
    ) -> None:
        """
        Args:
            section: the config's ``watch``.
            path: the file that the stacks of a hung run go to, in a folder that may not be there yet.
            say: told what the run is waiting for.
            end: ends the process with an exit code.
        """
        self.section = section
        self.path = path
        # How many compilations have begun; a step in which that grows has no usual time.
        self.compiles: Callable[[], int] = lambda: 0
        self.say, self._end = say, end
        # The median time of the latest steps, in seconds, once there are some.
        self.usual: float | None = None
        self._times: deque[float] = deque(maxlen=_LATEST)
        # A new object at each sign of progress. The run's thread alone replaces it, the watching one looks at it.
        self._activity: Activity = _RESTING
        self._closed = threading.Event()
        self._arm()
        self._thread = threading.Thread(target=self._work, name="watchdog", daemon=True)
        self._thread.start()

    def doing(self, name: str) -> None:
        """The run begins something that has no usual time."""
        self._activity = Activity(name)

    @contextlib.contextmanager
    def during(self, name: str) -> Iterator[None]:
        """What the run is `doing` in this block, after which nothing is expected of it for a while.

        A notebook may keep a run between two cells for as long as it likes.
        """
        self.doing(name)
        try:
            yield
        finally:
            self._activity = _RESTING

    def step(self, number: int) -> None:
        """The run begins a step."""
        self._activity = Activity(f"step {number}", True, self.compiles())

    def took(self, seconds: float) -> None:
        """A step was finished that took so long."""
        self._times.append(seconds)
        if len(self._times) >= _KNOWN:
            self.usual = statistics.median(self._times)
        self.progress()

    def progress(self) -> None:
        """What the run is at gets on."""
        name, is_step, _ = self._activity
        self._activity = Activity(name, is_step, self.compiles())

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _arm(self) -> None:
        """Have faulthandler end the process where this is not called again in time: its timer needs no lock."""
        if self.section.hang_factor:
            faulthandler.dump_traceback_later(self.section.hang_limit, exit=True, file=_stderr())

    def _work(self) -> None:
        tick = min(1.0, self.section.heartbeat / 5, self.section.hang_floor / 5)
        seen, waited, told = self._activity, 0.0, 0.0
        armed = before = time.monotonic()
        while not self._closed.wait(tick):
            now = time.monotonic()
            if now - armed > 10 * tick:
                self._arm()
                armed = now
            if self._activity is not seen or seen is _RESTING:
                seen, waited, told = self._activity, 0.0, 0.0
            # The process itself may have been stopped, or a debugger be attached: that is not waiting.
            waited, before = waited + min(now - before, 5 * tick), now
            if self._is_over(seen, waited):
                return
            if waited > told + max(self.section.heartbeat, 2 * (seen.is_step and self.usual or 0)):
                told = waited
                with contextlib.suppress(Exception):
                    self.say(f"still {self._describe(seen, waited)}")

    def _is_over(self, activity: Activity, waited: float) -> bool:
        """Whether the run hung and was ended."""
        limit = self._limit(activity)
        if not self.section.hang_factor or waited <= limit.seconds or activity is not self._activity:
            return False
        self._hung(f"hung: {self._describe(activity, waited)}, more than {limit.seconds:,.0f} s ({limit.key})")
        return True

    def _limit(self, activity: Activity) -> Limit:
        section, usual = self.section, self.usual
        if not activity.is_step or usual is None or self.compiles() != activity.compiled:
            return Limit(section.hang_limit, "watch.hang_limit")
        floor = Limit(section.hang_floor, "watch.hang_floor")
        return max(floor, Limit(usual * section.hang_factor, "watch.hang_factor"))

    def _describe(self, activity: Activity, waited: float) -> str:
        if not activity.is_step:
            return f"{activity.name}, {waited:,.0f} s"
        usual = f"; usual step {self.usual:,.3g} s" if self.usual else ""
        return f"waiting for {activity.name}, {waited:,.0f} s{usual}"

    def _hung(self, text: str) -> None:
        """Write down where each thread is, and end the process at once: what hangs cannot be ended cleanly."""
        kept = ""
        with contextlib.suppress(Exception):
            self._write_stacks(text)
            kept = f" and in {self.path}"
        faulthandler.dump_traceback(file=_stderr(), all_threads=True)
        message = (
            f"error: {text}; the stacks of all threads are above{kept}. What was saved is whole: start again to "
            f"continue from it (exit code {HUNG})\n"
        )
        with contextlib.suppress(OSError):
            os.write(_stderr(), message.encode())
        self._end(HUNG)

    def _write_stacks(self, text: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            local = self.path if is_local(self.path) else Path(folder) / self.path.name
            with local.open("w", encoding="utf-8") as file:
                file.write(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC, process {os.getpid()}: {text}\n\n")
                file.flush()
                faulthandler.dump_traceback(file=file, all_threads=True)
            if local != self.path:
                upload = threading.Thread(target=copy_file, args=(local, self.path), daemon=True)
                upload.start()
                upload.join(_UPLOAD)


def _stderr() -> int:
    """The process's own error output, whatever stands in for it in Python."""
    return sys.__stderr__.fileno() if sys.__stderr__ is not None else 2
