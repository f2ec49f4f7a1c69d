"""The documents of streams: which comes when, and how to go on from there without reading what came before.

An epoch reads the shards in a random order and cuts their documents into blocks, each with its documents in a random
order. All orders depend on the seed, the source, the epoch and the block alone, so the place where a block begins is
all that a position needs: who reads on from there sees the same documents, whatever was read before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice, takewhile
from operator import itemgetter
from typing import Any

from gemma_xla.data.draws import generator
from gemma_xla.data.packing import Document, Encode
from gemma_xla.data.sources import Position, StreamSource
from gemma_xla.errors import UserError

# Documents that are shuffled among each other; memory, the wait for the first and what a resume repeats grow with it.
BLOCK = 1000


@dataclass(frozen=True)
class BlockStart:
    """Where a block begins: after ``documents`` of all epochs, at ``place`` in the shard ``rank`` of its epoch."""

    epoch: int = 0
    block: int = 0
    documents: int = 0
    rank: int = 0
    place: Position = None


class Stream:
    """A source's documents, those that ``keep`` lets pass, block by block; shuffled if there is a ``key``."""

    def __init__(self, source: StreamSource, keep: Callable[[str], bool], key: tuple | None):
        self.field = source.field
        self._source = source
        self._keep = keep
        self._key = key

    def blocks(self, start: BlockStart) -> Iterator[tuple[BlockStart, list[str]]]:
        """Yield the blocks from ``start`` on, epoch after epoch; after each epoch comes an empty one.

        Raises:
            UserError: the source cannot be read, or an epoch holds no document.
        """
        while True:
            begin = start
            rows = self._source.read(self._shards(start.epoch), start.rank, start.place)
            while rows_of_block := list(islice(rows, BLOCK)):
                texts = self._shuffled([text for text, *_ in rows_of_block if self._keep(text)], start)
                yield start, texts
                _, rank, place = rows_of_block[-1]
                start = BlockStart(start.epoch, start.block + 1, start.documents + len(texts), rank, place)
            if begin.block == 0 and begin.documents == start.documents:
                raise UserError(f"{self.field}: no document is left to train on; lower data.eval_fraction")
            start = BlockStart(start.epoch + 1, documents=start.documents)
            yield start, []

    def once(self) -> Iterator[str]:
        """Yield the documents of the first epoch."""
        blocks = takewhile(lambda block: block[0].epoch == 0, self.blocks(BlockStart()))
        return (text for _, texts in blocks for text in texts)

    def _shards(self, epoch: int) -> list[int]:
        count = len(self._source.shards)
        return list(range(count)) if self._key is None else generator(*self._key, epoch).permutation(count).tolist()

    def _shuffled(self, texts: list[str], start: BlockStart) -> list[str]:
        if self._key is None:
            return texts
        return [texts[i] for i in generator(*self._key, start.epoch, start.block).permutation(len(texts))]


class StreamDocuments:
    """Hands a stream's documents to the lanes; those of other processes' lanes are passed over.

    Lanes that meet long documents lag behind, and the documents they will need wait in memory: over a long run, on
    the order of the square root of the number of documents read. A resume reads those again, and at most a block more.
    """

    def __init__(self, stream: Stream, encode: Encode, lanes: range, num_lanes: int) -> None:
        self._stream = stream
        self._encode = encode
        self._num_lanes = num_lanes
        self.seek(dict.fromkeys(lanes, 0), None)

    def seek(self, cursors: dict[int, int], position: dict[str, Any] | None) -> None:
        """Prepare for reading lanes from the given numbers of documents on."""
        self._first = cursors
        self._waiting: dict[int, deque[str]] = {lane: deque() for lane in cursors}
        # The starts of all blocks of which a lane may still need a document, and of the next.
        self._starts = deque([BlockStart(**(position or {}))])
        self._blocks = self._stream.blocks(self._starts[0])

    def position(self, cursors: dict[int, int]) -> dict[str, Any] | None:
        """Return where reading has to begin for lanes at the given numbers of documents; None without lanes."""
        if not cursors:
            return None
        needed = min(self._number(lane, cursor) for lane, cursor in cursors.items())
        while len(self._starts) > 1 and self._starts[1].documents <= needed:
            self._starts.popleft()
        return asdict(self._starts[0])

    def get(self, lane: int, cursor: int) -> Document:
        """Return document number ``cursor`` of a lane; each lane must ask for its documents in order."""
        while not self._waiting[lane]:
            self._read_block()
        text = self._waiting[lane].popleft()
        name = f"{self._stream.field} document {self._number(lane, cursor)} of the stream"
        return Document.encoded(name, text, self._encode)

    def _number(self, lane: int, cursor: int) -> int:
        return lane + cursor * self._num_lanes

    def _read_block(self) -> None:
        start, texts = next(self._blocks)
        if start != self._starts[-1]:
            self._starts.append(start)
        for number, text in enumerate(texts, start.documents):
            cursor, lane = divmod(number, self._num_lanes)
            if lane in self._first and cursor >= self._first[lane]:
                self._waiting[lane].append(text)


def first_position(positions: Iterable[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Return where reading has to begin for the lanes of several processes."""
    return min(filter(None, positions), key=itemgetter("epoch", "block"), default=None)
