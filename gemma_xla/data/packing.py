"""Cutting documents into rows of equal length, without losing or repeating a prediction.

A document of m tokens holds m - 1 pairs (a token and the one that follows it). A row is filled with the pairs of
successive documents; where one does not fit, its next pair is the first of the next row.

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
from gemma_xla.model.loss import IGNORE_INDEX

# From a text to its tokens, ``[tokens]`` of int32.
Encode = Callable[[str], np.ndarray]


class Document(NamedTuple):
    """Tokens of a document, or of a part of it, and what to call it in messages."""

    name: str
    tokens: np.ndarray


class Documents(Protocol):
    """Hands out the documents of each lane by number; None: there are no more."""

    def get(self, lane: int, cursor: int) -> Document | None: ...


class Lane:
    """Packs one lane's documents into rows.

    With several sources, each next document comes from a source drawn by weight; draw number n of a lane depends on
    the seed, the lane and n alone.
    """

    def __init__(self, lane: int, sources: list[Documents], weights: list[float], seq_len: int, seed: int):
        self._lane = lane
        self._sources = sources
        self._bounds = [bound / sum(weights) for bound in accumulate(weights)][:-1]
        self._seq_len = seq_len
        self._seed = seed
        # Documents of each source that are finished, and pairs of the one in progress that are.
        self.cursors = [0] * len(sources)
        self._offset = 0
        self._current: Document | None = None

    def next_row(self) -> list[Document]:
        """Return the pieces of documents that fill the next row: ``seq_len`` pairs, or less where documents end."""
        pieces, room = [], self._seq_len
        while room:
            source = self._draw()
            if self._current is None:
                self._current = self._sources[source].get(self._lane, self.cursors[source])
            if self._current is None:
                break
            name, tokens = self._current
            pairs = min(room, len(tokens) - 1 - self._offset)
            if pairs:
                pieces.append(Document(name, tokens[self._offset : self._offset + pairs + 1]))
            room -= pairs
            self._offset += pairs
            if self._offset == len(tokens) - 1:
                self.cursors[source] += 1
                self._offset, self._current = 0, None
        return pieces

    def state_dict(self) -> dict[str, Any]:
        """Return the position: the next row begins there."""
        return {"cursors": list(self.cursors), "offset": self._offset}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position; a document in progress is tokenized again."""
        self.cursors = list(state["cursors"])
        self._offset, self._current = state["offset"], None

    def _draw(self) -> int:
        """The source of the document in progress."""
        if not self._bounds:
            return 0
        return bisect(self._bounds, uniform("draw", self._seed, self._lane, sum(self.cursors)))


def pack(rows: list[list[Document]], seq_len: int, pad_token_id: int) -> dict[str, torch.Tensor]:
    """Return the batch that holds the given pieces of documents.

    All values are ``[B, T]``: ``input_ids``, ``position_ids`` (from 0 in each piece) and ``segment_ids`` (1, 2, ...
    for the pieces of a row, 0 for padding) int32, and ``shift_labels`` (the token after each input, -100 for padding)
    int64.
    """
    shape = (len(rows), seq_len)
    input_ids = np.full(shape, pad_token_id, dtype=np.int32)
    position_ids, segment_ids = np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.int32)
    shift_labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
    for row, pieces in enumerate(rows):
        start = 0
        for segment, (_, tokens) in enumerate(pieces, start=1):
            place = (row, slice(start, start + len(tokens) - 1))
            input_ids[place], shift_labels[place] = tokens[:-1], tokens[1:]
            position_ids[place], segment_ids[place] = np.arange(len(tokens) - 1), segment
            start += len(tokens) - 1
    batch = {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "segment_ids": segment_ids,
        "shift_labels": shift_labels,
    }
    return {name: torch.from_numpy(values) for name, values in batch.items()}
