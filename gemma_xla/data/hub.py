"""Opening data sets of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import datasets

from gemma_xla.config_data import SourceSection
from gemma_xla.data.readers import first_line
from gemma_xla.data.sources import IndexedSource, Source, StreamSource, has_text
from gemma_xla.errors import UserError, nearest


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
    """Return the text column of a data set.

    Raises:
        UserError: it has no such column, or one of another type.
    """
    column = section.column
    # Some streams only show in their first row what they hold.
    features = dataset.features or next(iter(dataset), {column: None})
    if column not in features:
        raise UserError(
            f"{field}.column: {section.path!r} has no column {column!r}{nearest(column, features)}; it has "
            f"{', '.join(features)}"
        )
    if dataset.features and getattr(features[column], "dtype", None) not in ("string", "large_string"):
        raise UserError(f"{field}.column: column {column!r} of {section.path!r} holds {features[column]}, not text")
    dataset = dataset.select_columns([column])
    if isinstance(dataset, datasets.Dataset):
        with quiet():
            full = dataset.filter(_have_text, input_columns=column, batched=True)
        # Without a table of indices between, where there is a choice.
        return IndexedSource(field, section.weight, full if len(full) < len(dataset) else dataset, column)
    # `datasets` reads a shard from a position on without making Python objects of what it passes over; a parquet
    # file's groups of rows are shards of their own for `reshard`, but each would cost requests to the hub.
    shards = [partial(_hub_shard, dataset, number, column, field) for number in range(dataset.num_shards)]
    return StreamSource(field, section.weight, shards)


def _have_text(texts: list[str | None]) -> list[bool]:
    return [has_text(text) for text in texts]


def _hub_shard(
    dataset: datasets.IterableDataset, number: int, column: str, field: str, place: dict[str, Any] | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    # A reader of its own: training and evaluation read in two threads, and positions belong to the data set object.
    shard = dataset.shard(num_shards=dataset.num_shards, index=number)
    if place is not None:
        shard.load_state_dict(place)
    try:
        for row in shard:
            text = row[column]
            if not isinstance(text, str | None):
                kind = type(text).__name__
                raise UserError(f"{field}.column: column {column!r} of shard {number} holds {kind}, not text")
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
