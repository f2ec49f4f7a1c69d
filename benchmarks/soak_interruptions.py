"""What is done to a run. Each function returns what the run may lose by it, or None if its process lives on."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import NamedTuple

from soak_run import SoakedRun

from gemma_xla.checkpoint import check, complete
from gemma_xla.checkpoint.folder import STATE, step_of

# What a run may print while its disk is full, in bytes: at any time, and with each step.
_LOG_ROOM, _LINE = 4096, 256


class Ended(NamedTuple):
    """A process has ended."""

    # The last step it reported, and the one that the next process must continue from.
    reported: int
    left: int
    # Steps that may be lost.
    allowed: int
    # What the next process must say.
    said: tuple[str, ...] = ()


Interruption = Callable[[SoakedRun, Random], Ended | None]


def kill(run: SoakedRun, draw: Random) -> Ended:
    """SIGKILL at a random moment of a step."""
    time.sleep(draw.random() * run.step_seconds)
    return _kill(run)


def kill_while_saving(run: SoakedRun, draw: Random) -> Ended:
    """SIGKILL when a random part of a checkpoint is written."""
    before = complete(run.checkpoints)[-1]
    enough = draw.random() * _size(before)

    def written() -> bool:
        newest = _newest_begun(run)
        return newest > before and _size(newest) >= enough

    run.wait_until(written, pause=0.001)
    return _kill(run)


def kill_while_starting(run: SoakedRun, draw: Random) -> Ended:
    """SIGKILL, and another one before the next process has gone on."""
    first = _kill(run)
    run.start()
    time.sleep(draw.random() * run.start_seconds)
    second = _kill(run)
    return second._replace(reported=max(first.reported, second.reported))


def terminate(run: SoakedRun, draw: Random) -> Ended:
    """SIGTERM at a random moment of a step: nothing may be lost."""
    time.sleep(draw.random() * run.step_seconds)
    reported = run.end(signal.SIGTERM)
    return Ended(reported, reported, 0)


def fill_disk(run: SoakedRun, draw: Random) -> None:
    """No room from a random moment until a checkpoint has failed; the older ones stay whole and the run goes on."""
    warning = "warning: the checkpoint of step"
    time.sleep(draw.random() * run.step_seconds)
    failed = run.text.count(warning)
    with run.full_disk(run.log.stat().st_size + _LOG_ROOM + _LINE * run.every):
        run.wait_until(lambda: run.text.count(warning) > failed)
        before = complete(run.checkpoints)[-1]
        check(before)
    run.wait_until(lambda: complete(run.checkpoints)[-1] > before)


def damage(run: SoakedRun, draw: Random) -> Ended:
    """SIGKILL, and a file of the newest checkpoint is changed by a bit, cut short or gone."""
    ended = _kill(run)
    before, newest = complete(run.checkpoints)[-2:]
    # A folder without its state is no checkpoint: it would be passed over without a word.
    files = sorted(file for file in newest.iterdir() if file.name != STATE)
    draw.choice([flip, cut, delete])(draw.choice(files), draw)
    said = (f"warning: checkpoint {newest}: ", f"{newest} is now called damaged-{newest.name}")
    gap = step_of(newest) - step_of(before)
    return Ended(ended.reported, step_of(before), ended.allowed + gap, said)


def flip(file: Path, draw: Random) -> None:
    """Change one bit."""
    with file.open("r+b") as opened:
        opened.seek(draw.randrange(file.stat().st_size))
        (byte,) = opened.read(1)
        opened.seek(-1, os.SEEK_CUR)
        opened.write(bytes([byte ^ 1 << draw.randrange(8)]))


def cut(file: Path, draw: Random) -> None:
    """Keep only the beginning."""
    os.truncate(file, draw.randrange(file.stat().st_size))


def delete(file: Path, _draw: Random) -> None:
    file.unlink()


INTERRUPTIONS: dict[str, Interruption] = {
    "killed": kill,
    "killed while saving": kill_while_saving,
    "killed while starting": kill_while_starting,
    "SIGTERM": terminate,
    "disk full": fill_disk,
    "checkpoint damaged": damage,
}


def _kill(run: SoakedRun) -> Ended:
    reported, newest = run.end(signal.SIGKILL), complete(run.checkpoints)[-1]
    # What a checkpoint under way holds is lost too; until its folder is there, nothing tells of it.
    return Ended(reported, step_of(newest), 2 * run.every)


def _newest_begun(run: SoakedRun) -> Path:
    return max(run.checkpoints.glob("step-*"))


def _size(folder: Path) -> int:
    size = 0
    # Files come and go meanwhile.
    with contextlib.suppress(FileNotFoundError):
        for file in folder.iterdir():
            size += file.stat().st_size
    return size
