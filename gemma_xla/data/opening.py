"""Opening text: files, folders and globs, here or in a bucket, and data sets of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple
from functools import partial
from pathlib import Path

import datasets
from datasets.exceptions import DatasetGenerationError, DatasetsError

from gemma_xla.config_data import SourceSection
from gemma_xla.data.files import are_files, file_kind, find_files
from gemma_xla.data.hub import open_hub, quiet
from gemma_xla.data.readers import FileReader, first_line
from gemma_xla.data.records import RecordFormat, record_format
from gemma_xla.data.sources import IndexedSource, Source, StreamSource, digest
from gemma_xla.errors import UserError
from gemma_xla.storage import is_url, location, reason

# Files that a stream is known again by; of a data set on the hub it is only the first, for the sake of a quick start.
_SAMPLED_FILES = 16
# Another number makes cached data sets anew: for when `FileReader` reads something differently.
_READER_VERSION = "2"


def open_source(section: SourceSection, field: str) -> Source:
    """Open the text that ``section`` names; ``field`` is its name in the config, such as ``data.train[0]``.

    Documents without text (empty, white space, null) do not count as documents.

    Raises:
        UserError: there is no such file or data set, it cannot be read, it holds no text, or has no such column.
    """
    try:
        return _open_files(section, field) if are_files(section.path) else _checked(open_hub(section, field), section)
    except OSError as error:
        raise UserError(f"{field}.path: {section.path!r} cannot be read ({reason(error)}); check the path") from error


def _open_files(section: SourceSection, field: str) -> Source:
    if section.subset or section.split != "train":
        raise UserError(f"{field}: 'subset' and 'split' are for hub data sets, not for files; remove them")
    files = find_files(section.path, field)
    kind = file_kind(files, field)
    format = _format(section, kind, files, field)
    reader = FileReader(field, kind, format, section.sample_by)
    shards = [partial(reader.read, file) for file in files]
    about = {"format": format.name, "where": partial(_where, reader, files)}
    stream = _checked(StreamSource(field, section.weight, shards, _SAMPLED_FILES, **about), section)
    return stream if section.streaming else IndexedSource(field, section.weight, _load(reader, files), "text", **about)


def _format(section: SourceSection, kind: str, files: tuple[str, ...], field: str) -> RecordFormat:
    """The format of the files; "auto": what the first record says."""
    if kind == "text":
        if section.format not in ("auto", "text"):
            raise UserError(
                f"{field}.format is {section.format!r}, but {section.path!r} is text; examples are records of .jsonl "
                "or .parquet files"
            )
        return RecordFormat()
    reader = FileReader(field, kind, RecordFormat(column=section.column))
    first = next(filter(None, map(reader.first, files)), None)
    # Without a record there are no documents, which is said elsewhere.
    return record_format(section, field, *first) if first else RecordFormat()


def _checked(source: Source, section: SourceSection) -> Source:
    if next(source.texts(), None) is None:
        raise UserError(f"{source.field}.path: there are no documents in {section.path!r}; name text that is not empty")
    return source


def _load(reader: FileReader, files: tuple[str, ...]) -> datasets.Dataset:
    """All documents of the files as a data set in the cache, which is made again when a file changes."""
    key = digest([_READER_VERSION, reader.kind, *astuple(reader.format), reader.sample_by, *map(_version, files)])
    try:
        with quiet():
            return datasets.Dataset.from_generator(
                _documents,
                features=datasets.Features({"text": datasets.Value("large_string")}),
                gen_kwargs={"reader": reader, "files": files},
                fingerprint=key,
            )
    except (DatasetsError, OSError) as error:
        cause = error.__cause__ or error
        if isinstance(error, DatasetGenerationError) and isinstance(cause, UserError):
            raise cause from cause.__cause__
        raise UserError(
            f"{reader.field}.path: the text could not be written to the cache {datasets.config.HF_DATASETS_CACHE}: "
            f"{first_line(cause)}; free some space, or set HF_HOME to another folder"
        ) from error


def _version(file: str) -> str:
    """What changes with a file."""
    if is_url(file):
        path = location(file)
        return f"{file} {path.fs.ukey(path.path)}"
    stat = Path(file).stat()
    return f"{Path(file).absolute()} {stat.st_size} {stat.st_mtime_ns}"


def _where(reader: FileReader, files: tuple[str, ...], wanted: str) -> str:
    """Say which record a document is."""
    found = (reader.where(file, position) for file in files for text, position in reader.read(file) if text == wanted)
    return next(found, "a record")


def _documents(reader: FileReader, files: tuple[str, ...]) -> Iterator[dict[str, str]]:
    for file in files:
        for text, _ in reader.read(file):
            yield {"text": text}
