"""Which document comes when.

The global batch of a step has L rows. Row r of every global batch is *lane* r, and each lane reads documents of its
own: of a source's endless sequence (epoch after epoch, each in another order) lane r gets the documents number r,
r + L, r + 2L, ... Whichever process computes a lane computes the same rows, so batches do not depend on the number of
processes, and a lane's position is one number per source.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections import deque
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from gemma_xla.config import DataSection, SourceSection
from gemma_xla.data.sources import Source, open_source
from gemma_xla.errors import UserError

Encode = Callable[[str], np.ndarray]


class Document(NamedTuple):
    """Tokens of a document, or of a part of it, and what to call it in messages."""

    name: str
    tokens: np.ndarray


class Corpus:
    """The sources of a run, with the held-out documents set apart.

    Without ``data.eval``, each document of ``data.train`` is held out with probability ``eval_fraction``, decided by
    the seed and the document's index (streams: its text). Sources of two or more documents give at least one to each
    side.

    Raises:
        UserError: a source cannot be opened, or no document can be held out though some should be.
    """

    def __init__(self, config: DataSection, *, seed: int):
        self.config = config
        self.seed = seed
        self.train_sources = _open_all(config.train, "data.train")
        self._eval_sources = _open_all(config.eval or [], "data.eval")
        self._fraction = 0.0 if config.eval else config.eval_fraction
        self._splits = [self._split(number, source) for number, source in enumerate(self.train_sources)]
        known = [len(split[1]) for split in self._splits if split is not None]
        if self._fraction and len(known) == len(self._splits) and not sum(known):
            raise UserError(
                f"data.eval_fraction is {self._fraction}, but data.train is a single document, of which none can be "
                "held out; name other text in data.eval, or set data.eval_fraction=0"
            )

    @property
    def has_eval(self) -> bool:
        """Whether there is text to evaluate on."""
        return bool(self._eval_sources or self._fraction)

    def texts(self) -> Iterator[str]:
        """Yield each training document once, in random order, sources mixed by weight: to train a tokenizer on."""
        draw = random.Random(self.seed)
        streams = [
            (self._train_texts(number, source), source.weight) for number, source in enumerate(self.train_sources)
        ]
        while streams:
            (picked,) = draw.choices(streams, [weight for _, weight in streams])
            text = next(picked[0], None)
            if text is None:
                streams.remove(picked)
            else:
                yield text

    def train_documents(self, encode: Encode, lanes: range, num_lanes: int) -> list[IndexedDocuments | StreamDocuments]:
        """Return, for each training source, what hands its documents to the lanes."""
        documents: list[IndexedDocuments | StreamDocuments] = []
        for number, source in enumerate(self.train_sources):
            if (split := self._splits[number]) is None:
                texts = self._endless(number, source)
                documents.append(StreamDocuments(source.field, texts, encode, lanes, num_lanes))
            else:
                key = ("order", self.seed, number) if self.config.shuffle else None
                documents.append(IndexedDocuments(source, split[0], encode, num_lanes, key))
        return documents

    def eval_documents(self, encode: Encode) -> Iterator[Document]:
        """Yield each held-out document once, in order.

        Raises:
            UserError: there is none (streams only show it at their end).
        """
        found = False
        for name, text in self._eval_texts():
            found = True
            yield Document(name, encode(text))
        if not found:
            raise UserError(f"data.eval_fraction is {self._fraction}, but no document was held out; raise it")

    def _split(self, number: int, source: Source) -> tuple[np.ndarray, np.ndarray] | None:
        """Indices of the training and of the held-out documents; None for streams."""
        if source.num_documents is None:
            return None
        chance = generator("split", self.seed, number).random(source.num_documents)
        held_out = chance < self._fraction
        if self._fraction:
            held_out[chance.argmin()] = True
            held_out[chance.argmax()] = False
        return np.flatnonzero(~held_out), np.flatnonzero(held_out)

    def _held_out(self, text: str) -> bool:
        """Whether a stream's document is held out: by its text, as shuffling changes its number."""
        return bool(self._fraction) and uniform("split", self.seed, text) < self._fraction

    def _train_texts(self, number: int, source: Source) -> Iterator[str]:
        if (split := self._splits[number]) is not None:
            order = generator("texts", self.seed, number).permutation(split[0])
            return (source.text(int(index)) for index in order)
        return (text for text in source.stream(0, self.seed) if not self._held_out(text))

    def _endless(self, number: int, source: Source) -> Callable[[], Iterator[str]]:
        """A function that begins to read a stream's training documents, epoch after epoch."""
        seed = self.seed + number if self.config.shuffle else None

        def texts() -> Iterator[str]:
            for epoch in itertools.count():
                found = False
                for text in source.stream(epoch, seed):
                    if not self._held_out(text):
                        found = True
                        yield text
                if not found:
                    raise UserError(f"{source.field}: no document is left to train on; lower data.eval_fraction")

        return texts

    def _eval_texts(self) -> Iterator[tuple[str, str]]:
        for source in self._eval_sources:
            for index, text in enumerate(source.stream()):
                yield f"{source.field} document {index}", text
        if self._fraction:
            for source, split in zip(self.train_sources, self._splits, strict=True):
                if split is None:
                    held_out = ((i, text) for i, text in enumerate(source.stream()) if self._held_out(text))
                else:
                    held_out = ((int(i), source.text(int(i))) for i in split[1])
                for index, text in held_out:
                    yield f"{source.field} document {index}", text


class IndexedDocuments:
    """A source's training documents by number; each epoch has an order of its own if there is a ``key``.

    Where there are fewer documents than lanes, each counts as several parts of about equal length, or the rows of a
    batch would be copies of each other.
    """

    def __init__(self, source: Source, indices: np.ndarray, encode: Encode, num_lanes: int, key: tuple | None):
        self._source = source
        self._indices = indices
        self._num_lanes = num_lanes
        self._key = key
        self._parts = -(-num_lanes // len(indices))
        # Lanes may be in neighbouring epochs.
        self._order = lru_cache(maxsize=4)(self._permutation)
        # Parts of a document are asked for one by one, but it is only tokenized as a whole.
        self._tokens = lru_cache(maxsize=None if self._parts > 1 else 0)(lambda i: encode(source.text(i)))

    def seek(self, cursors: dict[int, int]) -> None:
        """Prepare for reading lanes from the given positions: nothing to do."""

    def get(self, lane: int, cursor: int) -> Document:
        """Return document number ``cursor`` of a lane."""
        epoch, place = divmod(lane + cursor * self._num_lanes, len(self._indices) * self._parts)
        number, part = divmod(int(self._order(epoch)[place]), self._parts)
        index = int(self._indices[number])
        tokens = self._tokens(index)
        pairs = len(tokens) - 1
        start, stop = part * pairs // self._parts, (part + 1) * pairs // self._parts
        # A part's last token is only predicted: as an input it belongs to the next part.
        return Document(f"{self._source.field} document {index}", tokens[start : stop + 1])

    def _permutation(self, epoch: int) -> np.ndarray:
        count = len(self._indices) * self._parts
        return np.arange(count) if self._key is None else generator(*self._key, epoch).permutation(count)


class StreamDocuments:
    """A stream's training documents, read in order; those of other processes' lanes are passed over.

    Lanes that meet long documents lag behind, and the documents they will need wait in memory: over a long run, on
    the order of the square root of the number of documents read.
    """

    def __init__(
        self, field: str, texts: Callable[[], Iterator[str]], encode: Encode, lanes: range, num_lanes: int
    ) -> None:
        self._field = field
        self._begin = texts
        self._encode = encode
        self._num_lanes = num_lanes
        self.seek(dict.fromkeys(lanes, 0))

    def seek(self, cursors: dict[int, int]) -> None:
        """Prepare for reading lanes from the given positions: the stream is read anew up to there.

        Exact, where a snapshot of a stream would lose what its shuffle buffer holds.
        """
        self._first = cursors
        self._waiting: dict[int, deque[str]] = {lane: deque() for lane in cursors}
        self._numbered = enumerate(self._begin())

    def get(self, lane: int, cursor: int) -> Document:
        """Return document number ``cursor`` of a lane; each lane must ask for its documents in order."""
        while not self._waiting[lane]:
            number, text = next(self._numbered)
            place, owner = divmod(number, self._num_lanes)
            if owner in self._first and place >= self._first[owner]:
                self._waiting[owner].append(text)
        text = self._waiting[lane].popleft()
        return Document(f"{self._field} document {lane + cursor * self._num_lanes} of the stream", self._encode(text))


def uniform(*key: int | str) -> float:
    """Return a number in [0, 1) that depends on ``key`` alone."""
    # 53 bits: what a float holds, so that the result stays below 1.
    return (_digest(key) >> 11) / 2**53


def generator(*key: int | str) -> np.random.Generator:
    """Return a random generator whose numbers depend on ``key`` alone."""
    return np.random.default_rng(_digest(key))


def _digest(key: tuple[int | str, ...]) -> int:
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big")


def _open_all(sections: list[SourceSection], name: str) -> list[Source]:
    return [open_source(section, f"{name}[{number}]") for number, section in enumerate(sections)]
