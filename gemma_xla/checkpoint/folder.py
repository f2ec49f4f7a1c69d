"""Which checkpoints there are, whether they are whole, and which are kept."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from pydantic import BaseModel, ValidationError
from tqdm import tqdm

from gemma_xla.backend import Backend
from gemma_xla.errors import UserError
from gemma_xla.storage import move, persistently, read_text, reason, remove_file, remove_tree

STATE = "state.json"
# Raised whenever an older gemma_xla could not read what is written.
FORMAT = "gemma_xla checkpoint 1"
_BLOCK = 1 << 22


class CheckpointError(UserError):
    """A checkpoint that cannot be used: cut short, damaged, or not one of ours."""

    def __init__(self, folder: Path, problem: str) -> None:
        super().__init__(f"checkpoint {folder}: {problem}")


class FileInfo(BaseModel):
    """What a file must be like."""

    bytes: int
    xxh3: str


class _Sealed(BaseModel):
    format: str
    step: int
    files: dict[str, FileInfo]
    xxh3: str


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def complete(root: Path) -> list[Path]:
    """The complete checkpoints below ``root``, oldest first."""
    return [folder for folder in _numbered(root) if (folder / STATE).exists()]


def seal(state: dict[str, Any]) -> str:
    """The text of ``state.json``: the state and a checksum of it."""
    return json.dumps(state | {"xxh3": _checksum(state)}, indent=1)


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint.

    Raises:
        CheckpointError: it cannot be read, is damaged, or something else than gemma_xla wrote it.
        UserError: another version of gemma_xla wrote it.
    """
    try:
        state = json.loads(read_text(folder / STATE))
        _Sealed.model_validate(state)
    except (OSError, ValueError) as error:
        problem = "it was not written by gemma_xla" if isinstance(error, ValidationError) else reason(error)
        raise CheckpointError(folder, f"{STATE} cannot be used: {problem}") from error
    if state["format"] != FORMAT:
        # Sound, perhaps: neither to be passed over nor to be set aside.
        raise UserError(
            f"checkpoint {folder}: its format is {state['format']!r} and this gemma_xla reads {FORMAT!r}; use the "
            "version that wrote it, or choose another output_dir"
        )
    if _checksum(state) != state["xxh3"]:
        raise CheckpointError(folder, f"{STATE} is damaged: its checksum is not that of what was written")
    return state


def check(folder: Path, share: tuple[int, int] = (0, 1)) -> dict[str, Any]:
    """Return the state of a checkpoint after reading all its files, or every n-th of them, once.

    Args:
        share: (k, n): of each n files, look at the k-th; hosts share the work so.

    Raises:
        CheckpointError: a file is missing, cut short or damaged.
    """
    state = read_state(folder)
    files = {name: FileInfo(**info) for name, info in sorted(state["files"].items())}
    mine = list(files.items())[share[0] :: share[1]]
    total = sum(info.bytes for _, info in mine)
    # disable=None: no bar when the output is not a terminal.
    shown = {"desc": f"checking {folder.name}", "leave": False, "delay": 3, "disable": None}
    with tqdm(total=total, unit="B", unit_scale=True, **shown) as bar:
        for name, info in mine:
            _check_file(folder, name, info, bar)
    return state


class Newest(NamedTuple):
    """The newest checkpoint that is whole, its state, and the newer ones that are not."""

    folder: Path
    state: dict[str, Any]
    damaged: list[Path]


def newest(root: Path, say: Callable[[str], None], backend: Backend | None = None) -> Newest | None:
    """Return the newest checkpoint that is whole, the same on all hosts; None if there is none at all.

    One that a host does not see is not whole.

    Args:
        root: a run's folder of checkpoints.
        say: told of those that are passed over.
        backend: whose hosts share the work; None: this process does it alone.

    Raises:
        UserError: there are some, and none of them is whole.
    """
    backend = backend or Backend(torch.device("cpu"))
    # By all hosts, or they would speak of different ones.
    seen = backend.gather_objects([step_of(folder) for folder in complete(root)])
    steps = {step for host in seen for step in host}
    found, damaged = [root / folder_name(step) for step in sorted(steps)], []
    for folder in reversed(found):
        try:
            problem, state = None, check(folder, (backend.process_index, backend.process_count))
        except CheckpointError as error:
            host = f" (host {backend.process_index})" if backend.process_count > 1 else ""
            problem, state = f"{error}{host}", {}
        problems = [text for text in backend.gather_objects(problem) if text]
        if not problems:
            return Newest(folder, state, damaged)
        say(f"warning: {problems[0]}; trying the one before it")
        damaged.append(folder)
    if found:
        shared = " that all hosts share" if backend.process_count > 1 else ""
        raise UserError(
            f"{root}: none of its {len(found)} checkpoint(s) is whole; restore one from a copy, or choose another "
            f"output_dir{shared} to start anew: {problems[0]}"
        )
    return None


def prune(root: Path, keep_last: int, keep_every: int, keep: int | None = None) -> None:
    """Delete all complete checkpoints but the newest, multiples of ``keep_every``, and that of step ``keep``."""
    for folder in complete(root)[:-keep_last]:
        step = step_of(folder)
        if step != keep and (not keep_every or step % keep_every):
            discard(folder)


def discard(folder: Path) -> None:
    """Delete a checkpoint. What a kill leaves of it does not count as one."""
    remove_file(folder / STATE)
    remove_tree(folder)


def set_aside(folder: Path) -> Path:
    """Give a damaged checkpoint a name that no longer counts; nothing is deleted. Return the new path."""
    number = 0
    while (target := folder.with_name(f"damaged-{folder.name}" + (f"-{number}" if number else ""))).exists():
        number += 1
    move(folder, target)
    return target


def tidy(root: Path) -> None:
    """Delete what was being written when a run was killed. Only for the one run that writes there."""
    for folder in _numbered(root):
        if not (folder / STATE).exists():
            remove_tree(folder)


def _numbered(root: Path) -> list[Path]:
    if not root.exists():
        return []
    return sorted((f for f in root.iterdir() if re.fullmatch(r"step-\d{8,}", f.name)), key=step_of)


def _check_file(folder: Path, name: str, info: FileInfo, bar: tqdm) -> None:
    if "/" in name or "\\" in name:
        raise CheckpointError(folder, f"{STATE} names {name!r}, which is not in the folder")
    path, done = folder / name, bar.n
    try:
        size, found = persistently(lambda: _sum(path, bar, done), f"reading {path}", path)
    except OSError as error:
        raise CheckpointError(folder, f"{name} cannot be read ({reason(error)})") from error
    if size != info.bytes:
        raise CheckpointError(folder, f"{name} is {size:,} bytes long, not {info.bytes:,}")
    if found != info.xxh3:
        raise CheckpointError(folder, f"{name} is damaged: its checksum is not that of what was written")


def _sum(path: Path, bar: tqdm, done: int) -> tuple[int, str]:
    """Size and checksum of a file."""
    found, size, bar.n = xxhash.xxh3_64(), 0, done
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            found.update(block)
            size += len(block)
            bar.update(len(block))
    return size, found.hexdigest()


def _checksum(state: dict[str, Any]) -> str:
    rest = {key: value for key, value in state.items() if key != "xxh3"}
    return xxhash.xxh3_64_hexdigest(json.dumps(rest, sort_keys=True).encode())
