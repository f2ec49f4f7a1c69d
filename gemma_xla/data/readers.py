"""Reading the documents of files, from any position on, with errors that name the file and the line.

A document is a text with more in it than white space; all else (blank lines, empty files, nulls) is passed over.
Examples to fine-tune on are documents too, as JSON. A
position is a number that only its file's reader understands: bytes (before compression) in lines of text or JSON,
records in parquet and in lists of JSON.
"""

from __future__ import annotations

import gzip
import io
import json
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
from pyarrow import parquet

from gemma_xla.data.records import RecordFormat, Where, shown
from gemma_xla.data.sources import has_text
from gemma_xla.errors import UserError
from gemma_xla.storage import DELAYS, is_url, lasts, location, reason

_BOM = b"\xef\xbb\xbf"
# Rows of a parquet file that become Python objects at a time.
_BATCH_ROWS = 256
# Bytes of an object in a bucket that are handed on at a time: its own lines are cut in Python, one by one.
_BUFFER = 1 << 20


@dataclass(frozen=True)
class FileReader:
    """Reads files of one kind: ``json``, ``parquet`` or ``text``. ``field`` is their name in the config."""

    field: str
    kind: str
    format: RecordFormat = RecordFormat()
    sample_by: str = "document"

    def read(self, file: str, start: int | None = None) -> Iterator[tuple[str, int]]:
        """Yield each document from position ``start`` (None: the start) on, and the position after it.

        Where the network fails, reading goes on after the last document, a few times, waiting longer each time.

        Raises:
            UserError: the file cannot be read, or a record is not what it should be.
        """
        read = {"json": self._json, "parquet": self._parquet, "text": self._text}[self.kind]
        reached, delays = start or 0, iter(DELAYS)
        while True:
            try:
                with self._explained(file), _open(file) as stream:
                    for text, position in read(stream, file, reached):
                        reached, delays = position, iter(DELAYS)
                        if has_text(text):
                            yield text, position
                return
            except _Passing as error:
                if (delay := next(delays, None)) is None:
                    raise self._unreadable(file, error.__cause__) from error.__cause__
                time.sleep(delay)

    def first(self, file: str) -> tuple[list[str], str] | None:
        """Return the columns of a file's first record, and where it is; None: there is no record.

        Raises:
            UserError: the file cannot be read.
        """
        try:
            with self._explained(file), _open(file) as stream:
                if self.kind == "parquet":
                    return parquet.ParquetFile(stream).schema_arrow.names, file
                for record, where, _ in self._records(stream, file, 0):
                    self.format.check(record, self.field, where)
                    return list(record), where()
        except _Passing as error:
            raise self._unreadable(file, error.__cause__) from error.__cause__
        return None

    def where(self, file: str, position: int) -> str:
        """Name the record before a position."""
        if self.kind == "parquet":
            return f"{file}, row {position}"
        with _open(file) as stream:
            return f"{file}, record {position}" if _is_list(stream) else f"{file}:{_line_number(file, position - 1)}"

    def _text(self, stream: BinaryIO, file: str, start: int) -> Iterator[tuple[str, int]]:
        if self.sample_by == "document":
            if start == 0:
                text = self._decode(stream.read(), file)
                yield text.replace("\r\n", "\n").replace("\r", "\n"), 1
            return
        paragraph, end = [], start
        for raw, begin, end in _lines(stream, start):
            line = self._decode(raw, file, begin).rstrip("\r\n")
            if self.sample_by == "line":
                yield line, end
            elif line.strip():
                paragraph.append(line)
            else:
                yield "\n".join(paragraph), end
                paragraph = []
        yield "\n".join(paragraph), end

    def _json(self, stream: BinaryIO, file: str, start: int) -> Iterator[tuple[str | None, int]]:
        for record, where, position in self._records(stream, file, start):
            yield self.format.take(record, self.field, where), position

    def _records(self, stream: BinaryIO, file: str, start: int) -> Iterator[tuple[Any, Where, int]]:
        """Each parsed record from a position on, where it is, and the position after it."""
        if _is_list(stream):
            stream.seek(0)
            records = self._parse(self._decode(stream.read(), file), lambda line: f"{file}:{line}")
            for number, record in enumerate(records[start:], start + 1):
                yield record, lambda number=number: f"{file}, record {number}", number
            return
        for raw, begin, end in _lines(stream, start):

            def where(_: int = 1, begin: int = begin) -> str:
                return f"{file}:{_line_number(file, begin)}"

            if line := self._decode(raw, file, begin).strip():
                yield self._parse(line, where), where, end

    def _parquet(self, stream: BinaryIO, file: str, start: int) -> Iterator[tuple[str | None, int]]:
        table = parquet.ParquetFile(stream)
        self.format.check_columns(table.schema_arrow.names, self.field, lambda: file)
        row, first = 0, 0
        while first < table.num_row_groups and row + table.metadata.row_group(first).num_rows <= start:
            row += table.metadata.row_group(first).num_rows
            first += 1
        groups = list(range(first, table.num_row_groups))
        for batch in table.iter_batches(_BATCH_ROWS, row_groups=groups, columns=list(self.format.columns.values())):
            for values in zip(*batch.columns, strict=True):
                row += 1
                if row > start:
                    record = {name: value.as_py() for name, value in zip(batch.schema.names, values, strict=True)}
                    yield self.format.take(record, self.field, lambda row=row: f"{file}, row {row}"), row

    def _parse(self, text: str, where: Callable[[int], str]) -> Any:
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            line, reason = 1, str(error)
            if isinstance(error, json.JSONDecodeError):
                line, reason = error.lineno, f"{error.msg}, column {error.colno}"
            bad = shown(text.split("\n")[line - 1])
            raise UserError(
                f"{self.field}.path: {where(line)} is not valid JSON ({reason}): {bad}; correct or remove it: "
                "a file holds a record per line, or one list of records"
            ) from error

    def _decode(self, raw: bytes, file: str, begin: int = 0) -> str:
        try:
            return (raw.removeprefix(_BOM) if begin == 0 else raw).decode()
        except UnicodeDecodeError as error:
            line = _line_number(file, begin) + error.object.count(b"\n", 0, error.start)
            raise UserError(
                f"{self.field}.path: {file}:{line} is not UTF-8 text (byte 0x{error.object[error.start]:02x}); "
                "convert the file or leave it out"
            ) from error

    @contextmanager
    def _explained(self, file: str) -> Iterator[None]:
        try:
            yield
        except (EOFError, zlib.error, gzip.BadGzipFile, pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise UserError(
                f"{self.field}.path: {file} is cut short, damaged, or of another kind than its name says: "
                f"{first_line(error)}; fetch or write it again, or leave it out"
            ) from error
        except UserError:
            raise
        except Exception as error:
            if is_url(file) and not lasts(error):
                raise _Passing from error
            if is_url(file) or isinstance(error, OSError):
                raise self._unreadable(file, error) from error
            raise

    def _unreadable(self, file: str, error: BaseException) -> UserError:
        return UserError(f"{self.field}.path: {file} cannot be read: {reason(error)}")


class _Passing(Exception):
    """What waiting may mend; its cause says what it is."""


@contextmanager
def _open(file: str) -> Iterator[BinaryIO]:
    with ExitStack() as stack:
        if is_url(file):
            stream = stack.enter_context(location(file).open("rb"))
            stream = stack.enter_context(io.BufferedReader(stream, _BUFFER))
        else:
            stream = stack.enter_context(Path(file).open("rb"))
        yield stack.enter_context(gzip.open(stream, "rb")) if file.endswith(".gz") else stream


def _is_list(stream: BinaryIO) -> bool:
    """Whether a JSON file, read from its start, is one list of records."""
    return stream.read(64).lstrip(_BOM).lstrip().startswith(b"[")


def _lines(stream: BinaryIO, start: int) -> Iterator[tuple[bytes, int, int]]:
    """Each line from byte ``start`` on, and the bytes at which it begins and ends."""
    stream.seek(start)
    end = start
    for raw in stream:
        begin, end = end, end + len(raw)
        yield raw, begin, end


def _line_number(file: str, begin: int) -> int:
    """The number, from 1, of the line that begins at a byte; only counted when it is to be named."""
    with _open(file) as stream:
        number = 1
        for _, _, end in _lines(stream, 0):
            if end > begin:
                break
            number += 1
    return number


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
