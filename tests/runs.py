"""Whole runs in processes that can be killed: forked from one that has everything imported, so they start at once."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from pathlib import Path

# accelerate decides as it is imported: these runs are plain PyTorch.
os.environ["USE_TORCH_XLA"] = "0"
import accelerate  # noqa: E402
import matplotlib.pyplot  # noqa: E402, F401 (this and the next are only imported when a run needs them)
import torch  # noqa: E402
import torch._dynamo  # noqa: E402
from transformers import GemmaTokenizer  # noqa: E402, F401

from gemma_xla.cli import recipe  # noqa: E402
from recipes.pretrain import main  # noqa: E402

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.runs"])


def start(arguments: list[str], log: Path) -> multiprocessing.Process:
    """Start recipes/pretrain.py with these arguments; what it prints is added to ``log``."""
    process = _context.Process(target=_run, args=(arguments, log), daemon=True)
    process.start()
    return process


def _run(arguments: list[str], log: Path) -> None:
    with log.open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    torch.set_num_threads(1)
    accelerate.PartialState(cpu=True)
    with contextlib.suppress(BrokenPipeError):
        recipe("Pretrain.", main, arguments)
