"""Putting documents into rows of equal length, without losing or repeating a prediction.

A document of m tokens holds m - 1 pairs (a token and the one that follows it). A row is filled with the pairs of
successive documents. Where one does not fit, text is cut: its next pair is the first of the next row. An example to
fine-tune on is not: it begins the next row as a whole, and what is left of the row is padding.

Suffixes: B rows, T positions of a row.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from gemma_xla.data.draws import uniform
from gemma_xla.errors import UserError
from gemma_xla.model.loss import IGNORE_INDEX

# Examples that a lane passes over, one after the other, before it gives up.
_MOST_DROPPED = 10_000


class Example(NamedTuple):
    """Tokens of an example, ``[tokens]`` of int32, and which of them are learnt; one token: it is passed over."""

    tokens: np.ndarray
    trained: np.ndarray


# From a text to its tokens, ``[tokens]`` of int32, or from an example's JSON.
Encode = Callable[[str], np.ndarray | Example]


class Document(NamedTuple):
    """Tokens of a document, or of a part of it, and what to call it in messages.

    ``trained`` says which tokens are learnt, and that the document must not be cut; None: it is text, all are learnt.
    """

    name: str
    tokens: np.ndarray
    trained: np.ndarray | None = None

    @classmethod
    def encoded(cls, name: str, text: str, encode: Encode) -> Document:
        """Return the document of a text."""
        found = encode(text)
        return cls(name, *found) if isinstance(found, Example) else cls(name, found)

    @property
    def pairs(self) -> int:
        """How many predictions it holds."""
        return len(self.tokens) - 1

    @property
    def labels(self) -> np.ndarray:
        """What is to be predicted from each token but the last; -100: nothing."""
        labels = self.tokens[1:]
        return labels if self.trained is None else np.where(self.trained[1:], labels, IGNORE_INDEX)

    def part(self, start: int, stop: int) -> Document:
        """Return the pairs from number ``start`` up to ``stop``."""
        # The last token is only predicted: as an input it belongs to the next part.
        trained = None if self.trained is None else self.trained[start : stop + 1]
        return Document(self.name, self.tokens[start : stop + 1], trained)


class Documents(Protocol):
    """Hands out the documents of each lane by number; None: there are no more."""

    def get(self, lane: int, cursor: int) -> Document | None:
        """Return document number ``cursor`` of a lane."""


class Lane:
    """Packs one lane's documents into rows; without ``packing``, each example has a row of its own.

    With several sources, each next document comes from a source drawn by weight; draw number n of a lane depends on
    the seed, the lane and n alone.
    """

    def __init__(
        self, lane: int, sources: list[Documents], weights: list[float], seq_len: int, seed: int, packing: bool = True
    ):
        self._lane = lane
        self._sources = sources
        self._bounds = [bound / sum(weights) for bound in accumulate(weights)][:-1]
        self._seq_len = seq_len
        self._seed = seed
        self._packing = packing
        # Documents of each source that are finished, and pairs of the one in progress that are.
        self.cursors = [0] * len(sources)
        self._offset = 0
        # Pairs delivered, and those of them that are learnt.
        self._pairs = self._trained = 0
        self._current: Document | None = None
        self._dropped = 0

    def next_row(self) -> list[Document]:
        """Return the pieces of documents that make up the next row: ``seq_len`` pairs, or less before an example that
        does not fit, and where documents end.

        Raises:
            UserError: example after example is too long.
        """
        pieces, room = [], self._seq_len
        while room:
            source = self._draw()
            if self._current is None:
                self._current = self._sources[source].get(self._lane, self.cursors[source])
            document = self._current
            if document is None or (pieces and not self._may_follow(document, room)):
                break
            pairs = min(room, document.pairs - self._offset)
            if pairs:
                pieces.append(document.part(self._offset, self._offset + pairs))
            room -= pairs
            self._offset += pairs
            if self._offset == document.pairs:
                self._check_dropped(document)
                self.cursors[source] += 1
                self._offset, self._current = 0, None
                if pairs and document.trained is not None and not self._packing:
                    break
        self._pairs += sum(piece.pairs for piece in pieces)
        self._trained += sum(int((piece.labels != IGNORE_INDEX).sum()) for piece in pieces)
        return pieces

    def state_dict(self) -> dict[str, Any]:
        """Return the position, the next row begins there, and how much has been delivered."""
        return {
            "cursors": list(self.cursors),
            "offset": self._offset,
            "tokens": self._pairs,
            "trained_tokens": self._trained,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position; a document in progress is tokenized again."""
        self.cursors = list(state["cursors"])
        self._offset, self._current = state["offset"], None
        self._pairs, self._trained = state["tokens"], state["trained_tokens"]

    def _may_follow(self, document: Document, room: int) -> bool:
        """Whether a document may stand in the row that others have begun."""
        return document.trained is None or not document.pairs or (self._packing and document.pairs <= room)

    def _check_dropped(self, document: Document) -> None:
        self._dropped = 0 if document.pairs or document.trained is None else self._dropped + 1
        if self._dropped == _MOST_DROPPED:
            raise UserError(
                f"{document.name} and {_MOST_DROPPED - 1:,} examples before it are longer than data.seq_len "
                f"({self._seq_len}); raise it, or set data.too_long=truncate"
            )

    def _draw(self) -> int:
        """The source of the document in progress."""
        if not self._bounds:
            return 0
        return bisect(self._bounds, uniform("draw", self._seed, self._lane, sum(self.cursors)))


def pack(rows: list[list[Document]], seq_len: int, pad_token_id: int) -> dict[str, torch.Tensor]:
    """Return the batch that holds the given pieces of documents.

    All values are ``[B, T]``: ``input_ids``, ``position_ids`` (from 0 in each piece) and ``segment_ids`` (1, 2, ...
    for the pieces of a row, 0 for padding) int32, and ``shift_labels`` (the token after each input, -100 where it is
    not learnt and for padding) int64.
    """
    shape = (len(rows), seq_len)
    input_ids = np.full(shape, pad_token_id, dtype=np.int32)
    position_ids, segment_ids = np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.int32)
    shift_labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
    for row, pieces in enumerate(rows):
        start = 0
        for segment, piece in enumerate(pieces, start=1):
            place = (row, slice(start, start + piece.pairs))
            input_ids[place], shift_labels[place] = piece.tokens[:-1], piece.labels
            position_ids[place], segment_ids[place] = np.arange(piece.pairs), segment
            start += piece.pairs
    batch = {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "segment_ids": segment_ids,
        "shift_labels": shift_labels,
    }
    return {name: torch.from_numpy(values) for name, values in batch.items()}
