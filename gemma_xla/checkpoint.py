"""Checkpoints a run continues from: every tensor in the parts its devices held, and the rest of the state as JSON.

    checkpoints/step-00000100/
        tensors-00000.safetensors   the parts that host 0 held
        tensors-00000.json          which part of which tensor each of them is
        state.json                  step, data position, config, versions

A folder is written under another name and renamed when it is whole. Nothing is pickled, so nothing is executed on
loading, and any other mesh, or plain PyTorch, can read what one mesh wrote.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gemma_xla.backend import Backend, Piece
from gemma_xla.errors import UserError
from gemma_xla.model.config import GemmaConfig

Index = tuple[slice, ...]


def save(root: Path, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any], backend: Backend) -> Path:
    """Write one checkpoint and return its folder.

    Args:
        root: the run's folder of checkpoints.
        step: steps taken.
        tensors: what to save, on the devices.
        state: everything else, as JSON.
        backend: where the tensors are.
    """
    final, temporary = root / f"step-{step:08d}", root / f".step-{step:08d}.tmp"
    if backend.process_index == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    backend.barrier()
    _write_parts(temporary / f"tensors-{backend.process_index:05d}", tensors, backend)
    backend.barrier()
    if backend.process_index == 0:
        _write_text(temporary / "state.json", json.dumps(state, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
    backend.barrier()
    return final


def prune(root: Path, keep_last: int) -> None:
    """Delete all but the newest complete checkpoints."""
    for folder in complete(root)[:-keep_last]:
        # Under a name that no longer counts: what a kill leaves of it is not taken for a checkpoint.
        doomed = folder.rename(root / f".{folder.name}.old")
        shutil.rmtree(doomed)


def complete(root: Path) -> list[Path]:
    """The complete checkpoints below ``root``, oldest first."""
    return sorted(folder for folder in root.glob("step-*") if re.fullmatch(r"step-\d{8}", folder.name))


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    return _read_json(folder / "state.json")


class CheckpointReader:
    """Reads any part of any tensor of a checkpoint, whatever parts it was written in."""

    def __init__(self, folder: Path, prefix: str = "") -> None:
        """
        Args:
            folder: a complete checkpoint.
            prefix: only tensors whose name starts with it, under the rest of their name.

        Raises:
            UserError: the folder holds no readable index.
        """
        self.folder = folder
        self._tensors: dict[str, dict[str, Any]] = {}
        files = sorted(folder.glob("tensors-*.json"))
        if not files:
            raise UserError(f"checkpoint {folder}: it holds no tensors-*.json; give the folder of a checkpoint")
        for file in files:
            for name, entry in _read_json(file).items():
                if name.startswith(prefix):
                    known = self._tensors.setdefault(name.removeprefix(prefix), {**entry, "parts": []})
                    known["parts"] += [(file.with_suffix(".safetensors"), part) for part in entry["parts"]]

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        return getattr(torch, self._tensors[name]["dtype"])

    def read(self, name: str, index: Index | None = None) -> torch.Tensor:
        """Return a tensor, or the part of it at ``index`` (slices of step 1), on the CPU.

        Raises:
            UserError: a file cannot be read, or the parts do not cover what was asked for.
        """
        index = _bounded(index or (), self.shape(name))
        out = torch.empty([s.stop - s.start for s in index], dtype=self.dtype(name))
        filled = 0
        for file, part in self._tensors[name]["parts"]:
            start, stop = part["start"], part["stop"]
            low = [max(want.start, at) for want, at in zip(index, start, strict=True)]
            high = [min(want.stop, at) for want, at in zip(index, stop, strict=True)]
            if any(lo >= hi for lo, hi in zip(low, high, strict=True)):
                continue
            values = _read_part(file, part["key"], _between(low, high, start))
            out[_between(low, high, [want.start for want in index])] = values
            filled += values.numel()
        if filled != out.numel():
            raise UserError(f"checkpoint {self.folder}: {name!r} is incomplete; was a host's file lost?")
        return out


def _bounded(index: Index, shape: tuple[int, ...]) -> Index:
    """A slice with a start and a stop for each dimension; those left out are whole."""
    index += (slice(None),) * (len(shape) - len(index))
    bounds = [entry.indices(size)[:2] for entry, size in zip(index, shape, strict=True)]
    return tuple(slice(start, max(start, stop)) for start, stop in bounds)


def _between(low: list[int], high: list[int], origin: list[int]) -> Index:
    return tuple(slice(lo - at, hi - at) for lo, hi, at in zip(low, high, origin, strict=True))


def _read_part(file: Path, key: str, index: Index) -> torch.Tensor:
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.get_slice(key)[index] if index else opened.get_tensor(key)
    except (OSError, SafetensorError) as error:
        raise _unreadable(file, error) from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> UserError:
    return UserError(
        f"checkpoint {file.parent}: {file.name} cannot be read ({error}); delete this folder to use an older one"
    )


def open_run(folder: Path) -> tuple[CheckpointReader, GemmaConfig, dict[str, Any]]:
    """Return the newest checkpoint of a run: its weights, the architecture and the state.

    Raises:
        UserError: the folder is not a run, or has no complete checkpoint.
    """
    found = complete(folder / "checkpoints")
    if not found:
        raise UserError(f"{folder}: it holds no complete checkpoint below checkpoints/; give the folder of a run")
    state = read_state(found[-1])
    return CheckpointReader(found[-1], "model/"), GemmaConfig(**state["model"]), state


def _write_parts(stem: Path, tensors: dict[str, torch.Tensor], backend: Backend) -> None:
    parts: dict[str, torch.Tensor] = {}
    index: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        pieces: list[Piece] = backend.pieces(tensor)
        entry = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch."), "parts": []}
        for i, (place, values) in enumerate(pieces):
            key = f"{name}#{i}"
            parts[key] = values.contiguous()
            start, stop = [s.start for s in place], [s.stop for s in place]
            entry["parts"].append({"key": key, "start": start, "stop": stop})
        index[name] = entry
    file = stem.with_suffix(".safetensors")
    save_file(parts, file)
    _sync(file)
    _write_text(stem.with_suffix(".json"), json.dumps(index))


def replace_text(path: Path, text: str) -> None:
    """Write a file that is never seen half-written."""
    temporary = path.with_name(f".{path.name}.tmp")
    _write_text(temporary, text)
    temporary.replace(path)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
