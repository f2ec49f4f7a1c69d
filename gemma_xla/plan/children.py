"""The processes that do the work: a placeholder that is read, or a compiler that crashes, must not end the command."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from gemma_xla.errors import UserError

# What a process needs to have no accelerator, say little, and leave others alone.
_ENVIRONMENT = {
    "PJRT_DEVICE": "CPU",
    "CPU_NUM_DEVICES": "1",
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    # Operations carry the names and lines they are from.
    "XLA_HLO_DEBUG": "1",
    "XLA_IR_DEBUG": "1",
}
# Settings of the user's that would change what is recorded or compiled.
_FOREIGN = ("XLA_FLAGS", "XLA_SAVE_TENSORS_FILE", "PYTHONSTARTUP")


class PlanError(UserError):
    """The compiler failed, or took too long."""

    exit_code = 3


@dataclass
class Progress:
    """One line on a terminal that tells what is under way and since when; elsewhere a line per stage."""

    stream: TextIO
    prefix: str = ""

    def __post_init__(self) -> None:
        self._live = self.stream.isatty()
        self._width = 0

    def show(self, stage: str, seconds: float, done: bool = False) -> None:
        if not (self._live or done):
            return
        line = f"{self.prefix}{stage} {seconds:.0f} s"
        self.stream.write(f"\r{line:<{self._width}}" if self._live else f"{line}\n")
        self._width = len(line)
        self.stream.flush()

    def say(self, line: str) -> None:
        """Print a line of its own."""
        self.end()
        self.stream.write(f"{line}\n")
        self.stream.flush()

    def end(self) -> None:
        if self._live and self._width:
            self.stream.write(f"\r{'':<{self._width}}\r")
            self._width = 0
            self.stream.flush()


def run(
    module: str,
    arguments: list[str | Path],
    stage: str,
    progress: Progress,
    timeout: float,
    meanwhile: Callable[[], None] | None = None,
) -> None:
    """Run ``python -m module`` to its end; if this process ends first, that one does too.

    Args:
        stage: what it does, for people.
        timeout: seconds.
        meanwhile: called here while it runs; what that raises ends it.

    Raises:
        PlanError: it failed or took longer. Its last words are in the message.
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    environment = {k: v for k, v in os.environ.items() if k not in _FOREIGN} | _ENVIRONMENT
    start = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
        try:
            if meanwhile:
                meanwhile()
            while process.poll() is None:
                elapsed = time.monotonic() - start
                if elapsed > timeout:
                    raise PlanError(
                        f"to {stage} took longer than {timeout:g} s and was ended; allow more with --timeout, or set "
                        "train.layers=scan, which compiles one layer instead of all"
                    )
                progress.show(stage, elapsed)
                try:
                    process.wait(timeout=0.2)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        progress.show(stage, time.monotonic() - start, done=True)
        if process.returncode:
            output.seek(0)
            raise PlanError(_explain(stage, process.returncode, output.read().decode(errors="replace")))


def read(path: Path) -> dict[str, Any]:
    """What a child has written."""
    return json.loads(path.read_text(encoding="utf-8"))


def _explain(stage: str, code: int, output: str) -> str:
    """Why a child failed, in one line."""
    if "libtpu" in output and re.search(r"lockfile|already in use", output):
        return f"to {stage} needs libtpu, which another process has locked; end that, or wait for it"
    how = f"ended with signal {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
    if code == -signal.SIGKILL:
        how += " (most often: this machine ran out of memory)"
    lines = [line for line in output.splitlines() if line.strip()]
    last = lines[-1].strip() if lines else "it said nothing"
    return f"to {stage} {how}: {last[:500]}"
