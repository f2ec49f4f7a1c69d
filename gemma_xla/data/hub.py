"""Opening data sets of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import datasets

from gemma_xla.config_data import SourceSection
from gemma_xla.data.readers import first_line
from gemma_xla.data.records import RecordFormat, record_format
from gemma_xla.data.sources import IndexedSource, Source, StreamSource, has_text
from gemma_xla.errors import UserError


def open_hub(section: SourceSection, field: str) -> Source:
    """Open a data set by its name on the hub.

    Raises:
        UserError: it cannot be opened, or has no such column of text.
    """
    try:
        with quiet():
            dataset = datasets.load_dataset(
                section.path, section.subset, split=section.split, streaming=section.streaming
            )
    except Exception as error:  # of the data set, the file system or the network: there is no common type
        raise UserError(
            f"{field}.path: no local file is called {section.path!r}, and it could not be opened as a data set of the "
            f"hub (split {section.split!r}, subset {section.subset!r}): {first_line(error)}; check the name, "
            "the network and, for gated data sets, that you are logged in"
        ) from error
    return from_dataset(dataset, section, field)


def from_dataset(dataset: datasets.Dataset | datasets.IterableDataset, section: SourceSection, field: str) -> Source:
    """Return the texts or examples of a data set.

    Raises:
        UserError: it lacks a column, one is of another type, or an example is not what it should be.
    """
    # Some streams only show in their first row what they hold.
    names = list(dataset.features or next(iter(dataset), {section.column: None}))
    format = record_format(section, field, names, repr(section.path))
    if format.name == "text":
        _check_type(dataset, format.column, section.path, field)
    dataset = dataset.select_columns(list(format.columns.values()))
    about = {"format": format.name, "where": partial(_where, dataset, format, section.path, field)}
    if isinstance(dataset, datasets.Dataset):
        texts, column = _indexed(dataset, format, section.path, field)
        return IndexedSource(field, section.weight, texts, column, **about)
    # `datasets` reads a shard from a position on without making Python objects of what it passes over; a parquet
    # file's groups of rows are shards of their own for `reshard`, but each would cost requests to the hub.
    shards = [partial(_hub_shard, dataset, number, format, field) for number in range(dataset.num_shards)]
    return StreamSource(field, section.weight, shards, **about)


def _check_type(dataset: datasets.Dataset | datasets.IterableDataset, column: str, path: str, field: str) -> None:
    if dataset.features and getattr(dataset.features[column], "dtype", None) not in ("string", "large_string"):
        raise UserError(f"{field}.column: column {column!r} of {path!r} holds {dataset.features[column]}, not text")


def _indexed(dataset: datasets.Dataset, format: RecordFormat, path: str, field: str) -> tuple[datasets.Dataset, str]:
    """The data set that has a column with the text of each document, and that column."""
    with quiet():
        if format.name == "text":
            full = dataset.filter(_have_text, input_columns=format.column, batched=True)
            # Without a table of indices between, where there is a choice.
            return full if len(full) < len(dataset) else dataset, format.column
        texts = dataset.map(
            partial(_taken, format, path, field),
            with_indices=True,
            remove_columns=dataset.column_names,
            features=datasets.Features({"text": datasets.Value("large_string")}),
        )
    return texts, "text"


def _taken(format: RecordFormat, path: str, field: str, row: dict[str, Any], number: int) -> dict[str, str]:
    return {"text": format.take(row, field, lambda: f"{path!r}, row {number + 1}")}


def _where(dataset: Iterable[dict[str, Any]], format: RecordFormat, path: str, field: str, wanted: str) -> str:
    """Say which row a document is."""
    for number, row in enumerate(dataset):
        if _taken(format, path, field, row, number)["text"] == wanted:
            return f"{path!r}, row {number + 1}"
    return "a record"


def _have_text(texts: list[str | None]) -> list[bool]:
    return [has_text(text) for text in texts]


def _hub_shard(
    dataset: datasets.IterableDataset, number: int, format: RecordFormat, field: str, place: dict[str, Any] | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    # A reader of its own: training and evaluation read in two threads, and positions belong to the data set object.
    shard = dataset.shard(num_shards=dataset.num_shards, index=number)
    if place is not None:
        shard.load_state_dict(place)
    try:
        for row in shard:
            text = format.take(row, field, lambda: f"shard {number}")
            if has_text(text):
                yield text, shard.state_dict()
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{field}.path: reading shard {number} of the data set failed: {first_line(error.__cause__ or error)}; "
            "check the network, then start the run again: it continues from its newest checkpoint"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep progress bars off: they would tear a run's own lines."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
