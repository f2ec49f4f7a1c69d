"""Reading any part of any tensor of a checkpoint, whatever parts it was written in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, TypeAdapter

from gemma_xla.checkpoint.folder import CheckpointError, newest
from gemma_xla.errors import UserError
from gemma_xla.model.config import GemmaConfig
from gemma_xla.storage import reason
from gemma_xla.tensor_file import Index, TensorFile, bounded


class Part(BaseModel):
    """Where a stored tensor lies in the whole, per dimension."""

    key: str
    start: tuple[int, ...]
    stop: tuple[int, ...]


class Stored(BaseModel):
    """A whole tensor, and the parts of it that one host wrote."""

    shape: tuple[int, ...]
    dtype: str
    parts: list[Part]


INDEX = TypeAdapter(dict[str, Stored])


class CheckpointReader:
    """The tensors of one checkpoint."""

    def __init__(self, folder: Path, prefix: str = "") -> None:
        """
        Args:
            folder: a complete checkpoint.
            prefix: only tensors whose name starts with it, under the rest of their name.

        Raises:
            UserError: the folder holds no readable index.
        """
        self.folder = folder
        self._stored: dict[str, Stored] = {}
        self._parts: dict[str, list[tuple[Path, Part]]] = {}
        self._files: dict[Path, TensorFile] = {}
        names = sorted(file.name for file in folder.iterdir())
        indices = [folder / name for name in names if name.startswith("tensors-") and name.endswith(".json")]
        if not indices:
            raise CheckpointError(folder, "it holds no tensors-*.json; give the folder of a checkpoint")
        for file in indices:
            for name, stored in self._read_index(file).items():
                if name.startswith(prefix):
                    name = name.removeprefix(prefix)
                    self._stored.setdefault(name, stored)
                    parts = self._parts.setdefault(name, [])
                    parts += [(file.with_suffix(".safetensors"), part) for part in stored.parts]

    def names(self) -> list[str]:
        return list(self._stored)

    def where(self, name: str) -> str:
        """What to call the place of a tensor in messages."""
        return f"checkpoint {self.folder}"

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return getattr(torch, self._stored[name].dtype)

    def read(self, name: str, index: Index | None = None) -> torch.Tensor:
        """Return a tensor, or the part of it at ``index`` (slices of step 1), on the CPU.

        Raises:
            UserError: a file cannot be read, or the parts do not cover what was asked for.
        """
        index = bounded(index, self.shape(name))
        out = torch.empty([s.stop - s.start for s in index], dtype=self.dtype(name))
        self.copy_to(name, out, index)
        return out

    def copy_to(self, name: str, out: torch.Tensor, index: Index | None = None) -> None:
        """Fill ``out``, of the shape that ``index`` selects, on the CPU, with a tensor or the part of it there.

        Raises:
            UserError: as `read` does.
        """
        index = bounded(index, self.shape(name))
        filled = 0
        for file, part in self._parts[name]:
            low = [max(want.start, at) for want, at in zip(index, part.start, strict=True)]
            high = [min(want.stop, at) for want, at in zip(index, part.stop, strict=True)]
            if any(lo >= hi for lo, hi in zip(low, high, strict=True)):
                continue
            # `[...]` keeps a tensor of no dimension one that can be written to.
            target = out[(..., *_between(low, high, [want.start for want in index]))]
            self._file(file).copy_to(part.key, target, _between(low, high, part.start))
            filled += target.numel()
        if filled != out.numel():
            raise CheckpointError(self.folder, f"{name!r} is incomplete; was a host's file lost?")

    def _file(self, path: Path) -> TensorFile:
        if path not in self._files:
            self._files[path] = TensorFile(path)
        return self._files[path]

    def _read_index(self, file: Path) -> dict[str, Stored]:
        try:
            return INDEX.validate_json(file.read_bytes())
        except (OSError, ValueError) as error:
            raise CheckpointError(self.folder, f"{file.name} cannot be read ({reason(error)})") from error


def open_run(folder: Path, say: Callable[[str], None] = print) -> tuple[CheckpointReader, GemmaConfig, dict[str, Any]]:
    """Return the newest whole checkpoint of a run: its weights, the architecture and the state.

    Args:
        say: told of checkpoints that are passed over because they are damaged.

    Raises:
        UserError: the folder is not a run, or has no whole checkpoint.
    """
    found = newest(folder / "checkpoints", say)
    if not found:
        raise UserError(f"{folder}: it holds no complete checkpoint below checkpoints/; give the folder of a run")
    return CheckpointReader(found.folder, "model/"), GemmaConfig(**found.state["model"]), found.state


def _between(low: list[int], high: list[int], origin: list[int] | tuple[int, ...]) -> Index:
    return tuple(slice(lo - at, hi - at) for lo, hi, at in zip(low, high, origin, strict=True))
