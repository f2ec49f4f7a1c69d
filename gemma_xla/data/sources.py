"""The texts of one entry of ``data.train`` or ``data.eval``: numbered, or a stream of shards."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import datasets
import numpy as np

# Documents of an indexed source, or of a shard, that `content` is computed from.
_SAMPLES = 16

# Where reading a shard goes on, for JSON; None: at its start.
Position = Any
# Yields the documents of a shard from a position on, each with the position after it.
Shard = Callable[[Position], Iterator[tuple[str, Position]]]


def _anywhere(_: str) -> str:
    return "a record"


@dataclass(frozen=True)
class IndexedSource:
    """An entry of ``data.train`` or ``data.eval`` whose documents have numbers.

    ``field`` is the entry's name in the config, for messages; ``format`` that of a `RecordFormat`; and ``where`` finds
    out, by reading all of it again, where a document stands. ``content`` tells texts apart wherever they lie: it is
    computed from the number of documents and 16 of them, so a change elsewhere goes unnoticed.
    """

    field: str
    weight: float
    dataset: datasets.Dataset
    column: str
    format: str = "text"
    where: Callable[[str], str] = _anywhere

    @property
    def num_documents(self) -> int:
        """How many documents there are."""
        return len(self.dataset)

    @cached_property
    def content(self) -> str:
        places = np.linspace(0, self.num_documents - 1, _SAMPLES).astype(int)
        return digest([str(self.num_documents), *(self.text(int(place)) for place in places)])

    def text(self, index: int) -> str:
        """Return document ``index``."""
        return self.dataset[index][self.column]

    def texts(self) -> Iterator[str]:
        """Yield all documents in order."""
        return (self.text(index) for index in range(self.num_documents))


@dataclass(frozen=True)
class StreamSource:
    """An entry of ``data.train`` or ``data.eval`` that is read in order, a shard (a file) after the other.

    ``content`` tells texts apart wherever they lie: it is computed from the shards' number and the first documents of
    ``sampled`` of them. A change behind those goes unnoticed; so a line that stopped a run can be mended.
    """

    field: str
    weight: float
    shards: Sequence[Shard]
    sampled: int = 1
    format: str = "text"
    where: Callable[[str], str] = _anywhere

    @cached_property
    def content(self) -> str:
        places = np.linspace(0, len(self.shards) - 1, min(self.sampled, len(self.shards))).astype(int)
        texts = (text for place in places for text, _ in islice(self.shards[place](None), _SAMPLES))
        return digest([str(len(self.shards)), *texts])

    @property
    def num_documents(self) -> None:
        """A stream does not know."""
        return None

    def read(self, order: Sequence[int], rank: int = 0, place: Position = None) -> Iterator[tuple[str, int, Position]]:
        """Yield the documents of the shards in ``order``, from ``place`` in the shard number ``rank`` of it on.

        With each document come the rank and the place after it.

        Raises:
            UserError: a shard cannot be read.
        """
        for number in range(rank, len(order)):
            for text, after in self.shards[order[number]](place):
                yield text, number, after
            place = None

    def texts(self) -> Iterator[str]:
        """Yield all documents in order."""
        return (text for text, *_ in self.read(range(len(self.shards))))


Source = IndexedSource | StreamSource


def has_text(text: str | None) -> bool:
    """Whether a text counts as a document: there is more in it than white space."""
    return bool(text) and not text.isspace()


def digest(parts: Iterable[str]) -> str:
    """Return a short text that depends on ``parts`` alone."""
    result = hashlib.blake2b(digest_size=8)
    for part in parts:
        # With its length, or parts could be cut elsewhere.
        result.update(f"{len(part)} {part}".encode())
    return result.hexdigest()
