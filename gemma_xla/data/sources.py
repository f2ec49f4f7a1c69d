"""Opening text: local files, folders and globs, and data sets of the Hugging Face hub."""

from __future__ import annotations

import glob
import gzip
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError

from gemma_xla.config import SourceSection
from gemma_xla.errors import UserError, nearest

# Files of any other suffix are text: one document each.
_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
# A path that ends so is a file, even where none is: hub names do not.
_SUFFIXES = (*_FORMATS, ".txt", ".md", ".py", ".gz")
# Folders of Python's standard library that are not the library.
_STDLIB_EXCLUDED = {"site-packages", "test", "tests", "__pycache__", "idlelib", "lib2to3"}
# Documents that a shuffled stream draws from; memory and the wait for the first document grow with it.
_SHUFFLE_BUFFER = 1000


@dataclass(frozen=True)
class Source:
    """The documents of one entry of ``data.train`` or ``data.eval``.

    ``field`` is the entry's name in the config, for messages. ``files`` is empty for hub data sets.
    """

    field: str
    dataset: datasets.Dataset | datasets.IterableDataset
    column: str
    weight: float = 1.0
    files: tuple[str, ...] = ()

    @property
    def num_documents(self) -> int | None:
        """How many documents there are; None for streams, which do not know."""
        return None if isinstance(self.dataset, datasets.IterableDataset) else len(self.dataset)

    def text(self, index: int) -> str:
        """Return document ``index`` (not for streams)."""
        return self.dataset[index][self.column] or ""

    def stream(self, epoch: int = 0, seed: int | None = None) -> Iterator[str]:
        """Yield the documents in order or, for streams given a seed, in the approximately shuffled order of an epoch.

        Raises:
            UserError: a file cannot be read.
        """
        dataset = self.dataset
        if self.num_documents is None:
            # A reader of its own: those of one stream write to the same position, and training and evaluation read
            # in two threads. The only shard of one is everything.
            dataset = dataset.shard(num_shards=1, index=0)
        if seed is not None:
            dataset = dataset.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
            dataset.set_epoch(epoch)
        with _explained(self.field, self.files):
            for row in dataset:
                yield row[self.column] or ""


def open_source(section: SourceSection, field: str) -> Source:
    """Open the text that ``section`` names; ``field`` is its name in the config, such as ``data.train[0]``.

    Raises:
        UserError: there is no such file or data set, it cannot be read, it is empty, or it has no such text column.
    """
    if is_local(section.path):
        dataset, files = _open_local(section, field)
    else:
        dataset, files = _open_hub(section, field), ()
    column = "text" if files and _format(files, field) == "text" else section.column
    with _explained(field, files):
        row = next(iter(dataset), None)
    _check_row(row, column, section.path, field)
    return Source(field, dataset.select_columns([column]), column, section.weight, files)


def is_local(path: str) -> bool:
    """Whether ``path`` means files of this machine rather than a data set of the hub."""
    marked = path.startswith(("/", "./", "../", "~", "{stdlib}")) or glob.has_magic(path)
    return marked or path.endswith(_SUFFIXES) or Path(path).exists()


def find_files(path: str, field: str) -> tuple[str, ...]:
    """Return the files that a local path, folder (searched recursively) or glob stands for, sorted.

    Raises:
        UserError: there are none.
    """
    stdlib = sysconfig.get_path("stdlib")
    root = Path(path.replace("{stdlib}", stdlib)).expanduser()
    if glob.has_magic(str(root)) and not root.exists():
        # Unlike Path.glob, it leaves hidden files out.
        found = [Path(name) for name in glob.glob(str(root), recursive=True)]  # noqa: PTH207
    elif root.is_dir():
        found = [file for file in root.rglob("*") if not _hidden(file.relative_to(root))]
    elif root.exists():
        found = [root]
    else:
        raise UserError(f"{field}.path: there is no file or folder {str(root)!r}; check the path")
    if "{stdlib}" in path:
        found = [file for file in found if not _STDLIB_EXCLUDED.intersection(file.relative_to(stdlib).parts)]
    files = tuple(sorted(str(file) for file in found if file.is_file()))
    if not files:
        raise UserError(f"{field}.path: {path!r} matches no file; check the folder or pattern")
    return files


def _hidden(file: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in file.parts)


def _format(files: tuple[str, ...], field: str) -> str:
    formats = {_FORMATS.get(Path(file.removesuffix(".gz")).suffix.lower(), "text") for file in files}
    if len(formats) > 1:
        kinds = ", ".join(sorted(formats))
        raise UserError(
            f"{field}.path: it holds files of several kinds ({kinds}); name one, such as 'folder/**/*.jsonl'"
        )
    return formats.pop()


def _open_local(section: SourceSection, field: str) -> tuple[Any, tuple[str, ...]]:
    if section.subset or section.split != "train":
        raise UserError(f"{field}: 'subset' and 'split' are for hub data sets, not for files; remove them")
    files = find_files(section.path, field)
    file_format = _format(files, field)
    options = {"sample_by": section.sample_by} if file_format == "text" else {}
    # `datasets` takes file names for patterns.
    names = [glob.escape(file) for file in files]
    with _explained(field, files), _quiet():
        dataset = datasets.load_dataset(
            file_format, data_files=names, split="train", streaming=section.streaming, **options
        )
    return dataset, files


def _open_hub(section: SourceSection, field: str) -> Any:
    try:
        with _quiet():
            return datasets.load_dataset(section.path, section.subset, split=section.split, streaming=section.streaming)
    except (DatasetsError, OSError, ValueError) as error:
        raise UserError(
            f"{field}.path: no local file is called {section.path!r}, and it could not be opened as a data set of the "
            f"hub (split {section.split!r}, subset {section.subset!r}): {_first_line(error)}; check the name, "
            "the network and, for gated data sets, that you are logged in"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep progress bars off: they would tear a run's own lines."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


@contextmanager
def _explained(field: str, files: tuple[str, ...]) -> Iterator[None]:
    """Turn errors of reading into one message that names the file."""
    try:
        yield
    except (DatasetsError, OSError, ValueError, StopIteration) as error:
        cause = error.__cause__ or error
        if isinstance(cause, StopIteration):
            raise UserError(
                f"{field}.path: there are no documents in {', '.join(files)}; name text that is not empty"
            ) from error
        culprit = _undecodable(files) if isinstance(cause, UnicodeDecodeError) else None
        if culprit:
            raise UserError(f"{field}.path: {culprit} is not UTF-8 text; convert it or leave it out") from error
        where = f" {files[0]}" if len(files) == 1 else ""
        raise UserError(f"{field}.path: reading{where} failed: {_first_line(cause)}") from error


def _undecodable(files: tuple[str, ...]) -> str | None:
    """The first file that is not UTF-8."""
    for file in files:
        opener = gzip.open if file.endswith(".gz") else open
        try:
            with opener(file, "rt", encoding="utf-8") as stream:
                while stream.read(1 << 20):
                    pass
        except UnicodeDecodeError:
            return file
    return None


def _check_row(row: dict[str, Any] | None, column: str, path: str, field: str) -> None:
    if row is None:
        raise UserError(f"{field}.path: there are no documents in {path!r}; name text that is not empty")
    if column not in row:
        raise UserError(
            f"{field}.column: {path!r} has no column {column!r}{nearest(column, row)}; it has {', '.join(row)}"
        )
    if not isinstance(row[column], str | None):
        raise UserError(f"{field}.column: column {column!r} of {path!r} holds {type(row[column]).__name__}, not text")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
