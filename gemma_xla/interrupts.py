"""Ctrl-C and SIGTERM: a clean end at first, an immediate one when asked for again.

A signal raises `Interrupted` at once, except inside `deferred`, where the training loop asks at each step boundary
whether one has come. SIGTERM is what clouds send before they take a machine back.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator

# Saved, and to be started again (EX_TEMPFAIL of sysexits.h).
PREEMPTED = 75
_EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: PREEMPTED}
_PR_SET_PDEATHSIG = 1

_received: signal.Signals | None = None
_deferring = False


class Interrupted(KeyboardInterrupt):
    """A signal asked the process to end."""

    def __init__(self, received: signal.Signals) -> None:
        super().__init__(f"interrupted by {received.name}")
        self.exit_code = _EXIT_CODES[received]


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Handle SIGINT and SIGTERM inside the block. Use it in the main thread."""
    global _received
    _received = None
    # `accelerate launch` does not pass signals on; when it is ended, its child must not be left behind.
    if launched := "ACCELERATE_MIXED_PRECISION" in os.environ:
        end_with_parent(signal.SIGTERM)
    with _watched(os.getppid() if launched else None):
        before = {number: signal.signal(number, _handle) for number in _EXIT_CODES}
        try:
            yield
        finally:
            for number, handler in before.items():
                # The process is about to end: no traceback if another one comes.
                signal.signal(number, handler if _received is None else _end)


def end_with_parent(number: signal.Signals) -> None:
    """Have the kernel (Linux) send this process a signal when the one that started it ends, however that comes."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def _end(number: int, _frame: object) -> None:
    os._exit(_EXIT_CODES[signal.Signals(number)])


def received() -> signal.Signals | None:
    """The signal that has come, if one has."""
    return _received


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Note signals, for `received`, instead of raising."""
    global _deferring
    _deferring = True
    try:
        yield
    finally:
        _deferring = False


def _handle(number: int, _frame: object) -> None:
    global _received
    if _received is None:
        _received = signal.Signals(number)
        if not _deferring:
            raise Interrupted(_received)


@contextlib.contextmanager
def _watched(launcher: int | None) -> Iterator[None]:
    """Have a thread see each signal as it comes: the main thread only does between two calls into C, and a step is one.

    Python sends the signals' numbers as bytes (`signal.set_wakeup_fd`).

    Args:
        launcher: the process whose end is a SIGTERM too.
    """
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    before = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_end_at_the_second, args=(reading, launcher), name="signals", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        writing.close()


def _end_at_the_second(reading: socket.socket, launcher: int | None) -> None:
    seen: set[int] = set()
    with reading:
        while True:
            try:
                numbers = reading.recv(64)
            except TimeoutError:
                print("\nEnding cleanly; once more to end at once.", file=sys.stderr, flush=True)
                reading.settimeout(None)
                continue
            if not numbers:
                return
            for number in (number for number in numbers if number in _EXIT_CODES):
                if number == signal.SIGTERM and number in seen and launcher not in (None, os.getppid()):
                    # systemd, Slurm and clouds tell the launcher too, whose end told this process again.
                    launcher = None
                elif number in seen:
                    os._exit(_EXIT_CODES[signal.Signals(number)])
                if not seen:
                    # Not worth a word if it ends within a second.
                    reading.settimeout(1)
                seen.add(number)
