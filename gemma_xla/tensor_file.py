"""Safetensors files as streams: one chunk of one tensor in memory at a time, on any path that opens as a file.

A file is 8 bytes with the length of a header (little-endian), the header (a JSON object: each tensor's dtype, shape and
place), and the tensors' bytes without gaps (https://github.com/huggingface/safetensors#format). Paths may be local or,
as a `upath.UPath`, anywhere fsspec reaches.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from gemma_xla.errors import UserError
from gemma_xla.storage import persistently, reason

Index = tuple[slice, ...]

# What is read or converted at once, in bytes.
CHUNK = 8 * 2**20
_LONGEST_HEADER = 100 * 10**6  # the format's own limit
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


class Entry(NamedTuple):
    """What a header says of a tensor, its place left aside."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """One safetensors file, checked when it is opened: its length, and that its header tells no lies."""

    def __init__(self, path: Path) -> None:
        """
        Args:
            path: the file, a `pathlib.Path` or a `upath.UPath`.

        Raises:
            UserError: the file is missing, cut short, or no safetensors file.
        """
        self.path = path
        try:
            self._entries, self._starts = _read_header(path)
        except (OSError, ValueError, RecursionError) as error:
            raise _unreadable(path, error) from error

    def names(self) -> list[str]:
        """The tensors' names, in the order of their bytes."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """The type it is stored in."""
        return self._entries[name].dtype

    def read(self, name: str, index: Index | None = None) -> torch.Tensor:
        """The tensor, or the part at ``index`` (slices of step 1), on the CPU and as it is stored.

        Raises:
            UserError: the file can no longer be read.
        """
        shape = [at.stop - at.start for at in bounded(index, self.shape(name))]
        out = torch.empty(shape, dtype=self.dtype(name))
        self.copy_to(name, out, index)
        return out

    def copy_to(self, name: str, out: torch.Tensor, index: Index | None = None) -> None:
        """Fill ``out`` with the tensor, or the part at ``index`` (slices of step 1), a chunk at a time.

        Of a part, whole rows are read, also where it holds only some of their columns.

        Args:
            out: a CPU tensor of that shape, of any dtype and strides.

        Raises:
            UserError: the file can no longer be read.
        """
        entry = self._entries[name]
        index = bounded(index, entry.shape)
        if tuple(out.shape) != tuple(at.stop - at.start for at in index):
            raise ValueError(f"{name}: out has shape {tuple(out.shape)}, which is not that of {index}")
        if not out.numel():
            return
        if not entry.shape:
            entry, index, out = Entry(entry.dtype, (1,)), (slice(0, 1),), out[None]

        def fill() -> None:
            with self.path.open("rb") as file:
                _fill(file, self._starts[name], entry, index, out.detach())

        try:
            persistently(fill, f"reading {self.path}", self.path)
        except (OSError, EOFError) as error:
            raise _unreadable(self.path, error) from error


def write_tensors(
    file: BinaryIO,
    entries: Mapping[str, Entry],
    values: Iterable[torch.Tensor],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write a safetensors file: the header, then each value as it is produced.

    Args:
        file: open for writing, buffered.
        entries: what the file holds; wider dtypes first, so that each tensor is aligned.
        values: CPU tensors in the order of ``entries``; another dtype is converted, a chunk at a time.
        metadata: for the header's ``__metadata__``.

    Raises:
        ValueError: a value is missing, left over or of another shape, or a tensor would not be aligned.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    stop = 0
    for name, entry in entries.items():
        start, stop = stop, stop + entry.nbytes
        if start % entry.dtype.itemsize:
            raise ValueError(f"{name} ({entry.dtype}) would start at byte {start}; write wider dtypes first")
        header[name] = {"dtype": _CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, stop]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    # No `zip`: it would hold on to a value while the next one is made.
    values = iter(values)
    for name, entry in entries.items():
        _write_value(file, name, entry, next(values, None))
    if next(values, None) is not None:
        raise ValueError(f"there are more values than the {len(entries)} entries")


def bounded(index: Index | None, shape: tuple[int, ...]) -> Index:
    """A slice with a start and a stop for each dimension; those left out are whole."""
    index = (index or ()) + (slice(None),) * (len(shape) - len(index or ()))
    bounds = [at.indices(size)[:2] for at, size in zip(index, shape, strict=True)]
    return tuple(slice(start, max(start, stop)) for start, stop in bounds)


def _fill(file: BinaryIO, start: int, entry: Entry, index: Index, out: torch.Tensor) -> None:
    """Copy a part of the tensor whose first byte is at ``start``; it has at least one dimension and one element."""
    row, rows = Entry(entry.dtype, entry.shape[1:]), index[0]
    if row.nbytes > CHUNK:
        for i in range(rows.start, rows.stop):
            _fill(file, start + i * row.nbytes, row, index[1:], out[i - rows.start])
        return
    step = CHUNK // row.nbytes
    buffer = bytearray(min(step, rows.stop - rows.start) * row.nbytes)
    file.seek(start + rows.start * row.nbytes)
    for i in range(rows.start, rows.stop, step):
        count = min(step, rows.stop - i)
        _read_into(file, memoryview(buffer)[: count * row.nbytes])
        chunk = torch.frombuffer(buffer, dtype=row.dtype, count=count * math.prod(row.shape)).view(count, *row.shape)
        out[i - rows.start :][:count].copy_(chunk[(slice(None), *index[1:])])


def _read_into(file: BinaryIO, buffer: memoryview) -> None:
    while buffer:
        count = file.readinto(buffer)
        if not count:
            raise EOFError("it ends before its tensors do")
        buffer = buffer[count:]


def _write_value(file: BinaryIO, name: str, entry: Entry, value: torch.Tensor | None) -> None:
    if value is None or tuple(value.shape) != tuple(entry.shape):
        found = "is missing" if value is None else f"has shape {tuple(value.shape)}"
        raise ValueError(f"{name}: the value {found}; its entry says {tuple(entry.shape)}")
    if value.numel():
        _write(file, value.detach() if value.dim() else value.detach()[None], entry.dtype)


def _write(file: BinaryIO, value: torch.Tensor, dtype: torch.dtype) -> None:
    row = math.prod(value.shape[1:]) * dtype.itemsize
    if row > CHUNK:
        for part in value.unbind():
            _write(file, part, dtype)
        return
    for part in value.split(CHUNK // row):
        file.write(part.to(dtype).contiguous().view(-1).view(torch.uint8).numpy().data)


def _read_header(path: Path) -> tuple[dict[str, Entry], dict[str, int]]:
    """Each tensor's entry and first byte.

    Raises:
        ValueError: the header lies.
    """
    with path.open("rb") as file:
        length = file.seek(0, 2)
        file.seek(0)
        size = int.from_bytes(file.read(8), "little")
        if length < 8 or size > min(_LONGEST_HEADER, length - 8):
            raise ValueError(f"its first 8 bytes announce a header of {size} bytes; the file has {length}")
        header = json.loads(file.read(size).decode())
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    header.pop("__metadata__", None)
    places = {name: _place(name, fields) for name, fields in header.items()}
    entries, starts, end = {}, {}, 0
    for name, (entry, start) in sorted(places.items(), key=lambda item: (item[1][1], item[1][0].nbytes)):
        if start != end:
            raise ValueError(f"{name} starts at byte {start} of the data, {end} is expected")
        entries[name], starts[name], end = entry, 8 + size + start, start + entry.nbytes
    if 8 + size + end != length:
        raise ValueError(f"its header describes {8 + size + end} bytes; the file has {length}")
    return entries, starts


def _place(name: str, fields: Any) -> tuple[Entry, int]:
    """A tensor's entry and where its data starts, as the header has it."""
    if not isinstance(fields, dict):
        raise ValueError(f"{name} is described by {fields!r}")
    code, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(code, str) or code not in _DTYPES:
        raise ValueError(f"{name} has dtype {code!r}; known are {', '.join(_DTYPES)}")
    for key, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
            raise ValueError(f"{name} has {key} {numbers!r}")
    entry = Entry(_DTYPES[code], tuple(shape))
    if len(offsets) != 2 or offsets[1] - offsets[0] != entry.nbytes:
        raise ValueError(f"{name} has shape {shape} and dtype {code}, {entry.nbytes} bytes, but data_offsets {offsets}")
    return entry, offsets[0]


def _unreadable(path: Path, error: Exception) -> UserError:
    # Of a missing file fsspec says no more than its name.
    why = "there is no such file" if isinstance(error, FileNotFoundError) else reason(error)
    return UserError(f"{path}: cannot be read ({why}); write or download it again")
