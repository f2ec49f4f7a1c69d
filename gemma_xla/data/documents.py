"""Which document comes when.

The global batch of a step has L rows. Row r of every global batch is *lane* r, and each lane reads documents of its
own: of a source's endless sequence (epoch after epoch, each in another order) lane r gets the documents number r,
r + L, r + 2L, ... Whichever process computes a lane computes the same rows, so batches do not depend on the number of
processes, and a lane's position is one number per source (for streams, with a place to read on from).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from transformers import PreTrainedTokenizerBase

from gemma_xla.config_data import DataSection, SourceSection
from gemma_xla.data.draws import generator, uniform
from gemma_xla.data.examples import source_encoder
from gemma_xla.data.opening import open_source
from gemma_xla.data.packing import Document, Encode
from gemma_xla.data.records import plain_text
from gemma_xla.data.sources import IndexedSource, Source, StreamSource
from gemma_xla.data.streams import Stream, StreamDocuments
from gemma_xla.errors import UserError


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
        self.eval_sources = _open_all(config.eval or [], "data.eval")
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
        return bool(self.eval_sources or self._fraction)

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

    def train_documents(self, tokenizer: PreTrainedTokenizerBase, lanes: range, num_lanes: int) -> list[TrainDocuments]:
        """Return, for each training source, what hands its documents to the lanes.

        Raises:
            UserError: the tokenizer lacks a chat template that they need.
        """
        documents: list[TrainDocuments] = []
        for number, source in enumerate(self.train_sources):
            encode = source_encoder(tokenizer, source, self.config)
            if isinstance(source, StreamSource):
                stream = self._stream(number, source, self.config.shuffle)
                documents.append(StreamDocuments(stream, encode, lanes, num_lanes))
            else:
                documents.append(self.indexed_documents(number, source, encode, num_lanes))
        return documents

    def train_indices(self, number: int) -> np.ndarray:
        """Return which documents of the indexed training source ``number`` are trained on."""
        return self._splits[number][0]

    def train_texts(self, number: int) -> Iterator[str]:
        """Yield the documents of the indexed training source ``number`` that are trained on."""
        return (text for _, text in _numbered(self.train_sources[number], self.train_indices(number)))

    def indexed_documents(self, number: int, source: IndexedSource, encode: Encode, num_lanes: int) -> IndexedDocuments:
        """Return what hands the documents of training source ``number``, read from ``source``, to the lanes."""
        key = ("order", self.seed, number) if self.config.shuffle else None
        return IndexedDocuments(source, self.train_indices(number), encode, num_lanes, key)

    def eval_documents(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[Document]:
        """Yield each held-out document once, in order.

        Raises:
            UserError: there is none (streams only show it at their end).
        """
        found = False
        for source, documents in self.held_out():
            encode = source_encoder(tokenizer, source, self.config)
            for index, text in documents:
                found = True
                yield Document.encoded(f"{source.field} document {index}", text, encode)
        if not found:
            raise UserError(f"data.eval_fraction is {self._fraction}, but no document was held out; raise it")

    def held_out(self) -> Iterator[tuple[Source, Iterator[tuple[int, str]]]]:
        """Yield each source of held-out documents, with their numbers and texts."""
        for source in self.eval_sources:
            yield source, enumerate(source.texts())
        if self._fraction:
            for source, split in zip(self.train_sources, self._splits, strict=True):
                if isinstance(source, StreamSource):
                    texts = source.texts()
                    yield source, ((i, text) for i, text in enumerate(texts) if self._held_out(text))
                else:
                    yield source, _numbered(source, split[1])

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

    def _stream(self, number: int, source: StreamSource, shuffle: bool) -> Stream:
        return Stream(source, lambda text: not self._held_out(text), ("stream", self.seed, number) if shuffle else None)

    def _train_texts(self, number: int, source: Source) -> Iterator[str]:
        if isinstance(source, StreamSource):
            records = self._stream(number, source, shuffle=True).once()
        else:
            order = generator("texts", self.seed, number).permutation(self.train_indices(number))
            records = (source.text(int(index)) for index in order)
        return (plain_text(source.format, record) for record in records)


class IndexedDocuments:
    """A source's training documents by number; each epoch has an order of its own if there is a ``key``.

    Where there are fewer texts than lanes, each counts as several parts of about equal length, or the rows of a batch
    would be copies of each other. Examples are whole: there, lanes are in different epochs.
    """

    def __init__(self, source: IndexedSource, indices: np.ndarray, encode: Encode, num_lanes: int, key: tuple | None):
        self._source = source
        self._indices = indices
        self._encode = encode
        self._num_lanes = num_lanes
        self._key = key
        self._parts = -(-num_lanes // len(indices)) if source.format == "text" else 1
        # Lanes may be in neighbouring epochs.
        self._order = lru_cache(maxsize=4)(self._permutation)
        # Parts of a document are asked for one by one, but it is only tokenized as a whole.
        self._document = lru_cache(maxsize=None if self._parts > 1 else 0)(self._read)

    def seek(self, cursors: dict[int, int], position: None) -> None:
        """Prepare for reading lanes from the given numbers of documents on: nothing to do."""

    def position(self, cursors: dict[int, int]) -> None:
        """Return where reading has to begin: nowhere, as each document is read by its number."""

    def get(self, lane: int, cursor: int) -> Document:
        """Return document number ``cursor`` of a lane."""
        epoch, place = divmod(lane + cursor * self._num_lanes, self.per_epoch)
        number, part = divmod(int(self._order(epoch)[place]), self._parts)
        index = int(self._indices[number])
        document = self._document(index)
        start, stop = (i * document.pairs // self._parts for i in (part, part + 1))
        return document.part(start, stop)

    @property
    def per_epoch(self) -> int:
        """How many documents, or parts of documents, make up an epoch."""
        return len(self._indices) * self._parts

    def _read(self, index: int) -> Document:
        return Document.encoded(f"{self._source.field} document {index}", self._source.text(index), self._encode)

    def _permutation(self, epoch: int) -> np.ndarray:
        count = self.per_epoch
        return np.arange(count) if self._key is None else generator(*self._key, epoch).permutation(count)


TrainDocuments = IndexedDocuments | StreamDocuments


def _numbered(source: IndexedSource, indices: np.ndarray) -> Iterator[tuple[int, str]]:
    return ((int(index), source.text(int(index))) for index in indices)


def _open_all(sections: list[SourceSection], name: str) -> list[Source]:
    return [open_source(section, f"{name}[{number}]") for number, section in enumerate(sections)]
