"""Whole runs in processes that can be killed: forked from one that has everything imported, so they start at once."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    process = _context.Process(target=pretrain, args=(arguments, log), daemon=True)
    process.start()
    return process


def start_several(count: int, function: Callable, *args: Any) -> list[multiprocessing.Process]:
    """Start ``function(*args)`` in several processes, as a launcher would: connected, each with a number."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(count):
        launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        launched |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        variables = {name: str(value) for name, value in launched.items()}
        processes.append(_context.Process(target=_launched, args=(variables, function, *args), daemon=True))
        processes[-1].start()
    return processes


def _launched(variables: dict[str, str], function: Callable, *args: Any) -> None:
    os.environ |= variables
    torch.set_num_threads(1)
    accelerate.PartialState(cpu=True)
    function(*args)


def pretrain(arguments: list[str], log: Path) -> None:
    """recipes/pretrain.py in this process; what it prints is added to ``log``."""
    with log.open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    torch.set_num_threads(1)
    accelerate.PartialState(cpu=True)
    with contextlib.suppress(BrokenPipeError):
        recipe("Pretrain.", main, arguments)
