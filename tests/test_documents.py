"""Streams: what comes when, where reading goes on, and how much is read again."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice

import numpy as np
import pytest

from gemma_xla.data.sources import StreamSource
from gemma_xla.data.streams import BlockStart, Stream, StreamDocuments, first_position
from gemma_xla.errors import UserError

BLOCK = 8
SHARDS = [5, 40, 1, 0, 23, 64, 8]
TEXTS = [f"{shard}-{i}" for shard, count in enumerate(SHARDS) for i in range(count)]
KEY = ("stream", 0, 0)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr("gemma_xla.data.streams.BLOCK", BLOCK)


class Library:
    """A source that keeps account of what is read of it."""

    def __init__(self, shards: list[int] = SHARDS):
        self.read: list[str] = []
        self.source = StreamSource("data.train[0]", 1.0, [self._shard(i, count) for i, count in enumerate(shards)])

    def _shard(self, shard: int, count: int):
        def read(place: int | None) -> Iterator[tuple[str, int]]:
            for i in range(place or 0, count):
                self.read.append(f"{shard}-{i}")
                yield f"{shard}-{i}", i + 1

        return read

    def stream(self, key: tuple | None = KEY, keep=lambda text: True) -> Stream:
        return Stream(self.source, keep, key)

    def documents(self, lanes: range = range(4), num_lanes: int = 4, **options) -> StreamDocuments:
        return StreamDocuments(self.stream(**options), encode, lanes, num_lanes)


def encode(text: str) -> np.ndarray:
    return np.array([2, *text.encode(), 1], dtype=np.int32)


def text_of(documents: StreamDocuments, lane: int, cursor: int) -> str:
    return bytes(documents.get(lane, cursor).tokens[1:-1].tolist()).decode()


def epochs(stream: Stream, count: int) -> list[list[str]]:
    found: list[list[str]] = [[] for _ in range(count + 1)]
    for start, texts in stream.blocks(BlockStart()):
        if start.epoch == count:
            return found[:count]
        found[start.epoch] += texts
    raise AssertionError("unreachable")


class TestOrder:
    def test_each_epoch_holds_every_document_once_in_another_order(self):
        first, second, third = epochs(Library().stream(), 3)
        assert Counter(first) == Counter(second) == Counter(third) == Counter(TEXTS)
        assert TEXTS != first != second != third != first

    def test_without_a_key_nothing_is_shuffled(self):
        assert epochs(Library().stream(key=None), 2) == [TEXTS, TEXTS]

    def test_the_key_decides(self):
        assert epochs(Library().stream(), 1) == epochs(Library().stream(), 1)
        assert epochs(Library().stream(), 1) != epochs(Library().stream(key=("stream", 1, 0)), 1)

    def test_documents_move_within_their_block_and_shards_as_a_whole(self):
        (texts,) = epochs(Library().stream(), 1)
        shards = [int(text.partition("-")[0]) for text in texts]
        # Shard 5 has 64 documents: blocks in its middle hold nothing else.
        middle = [block for block in zip(*[iter(shards)] * BLOCK, strict=False) if set(block) == {5}]
        assert len(middle) >= 6
        assert texts != sorted(texts, key=lambda text: shards.index(int(text.partition("-")[0])))

    def test_blocks_have_orders_of_their_own(self):
        orders = set()
        for start, texts in islice(Library([5 * BLOCK]).stream().blocks(BlockStart()), 12):
            if texts:
                first = start.block * BLOCK
                orders.add(tuple(int(text.partition("-")[2]) - first for text in texts))
        assert {tuple(sorted(order)) for order in orders} == {tuple(range(BLOCK))}
        assert len(orders) == 10

    def test_once_is_the_first_epoch_and_opens_nothing_of_the_second(self):
        library = Library()
        assert list(library.stream().once()) == epochs(Library().stream(), 1)[0]
        assert len(library.read) == len(TEXTS)

    def test_documents_that_are_not_kept_do_not_count(self):
        def keep(text: str) -> bool:
            return not text.endswith("3")

        (texts,) = epochs(Library().stream(keep=keep), 1)
        assert Counter(texts) == Counter(filter(keep, TEXTS))
        starts = {start.documents for start, _ in islice(Library().stream(keep=keep).blocks(BlockStart()), 5)}
        assert max(starts) < 4 * BLOCK

    def test_an_epoch_without_documents_is_refused(self):
        with pytest.raises(UserError, match=r"^data.train\[0\]: no document is left to train on"):
            Library().documents(keep=lambda text: False).get(0, 0)


class TestPosition:
    @pytest.mark.parametrize("key", [KEY, None])
    def test_from_each_block_on_the_rest_is_the_same(self, key):
        def joined(blocks: Iterator[tuple[BlockStart, list[str]]]) -> list[str]:
            return list(islice((text for _, texts in blocks for text in texts), 2 * len(TEXTS)))

        blocks = Library().stream(key).blocks(BlockStart())
        expected = [text for texts in epochs(Library().stream(key), 5) for text in texts]
        for start, _ in islice(blocks, 50):
            rest = joined(Library().stream(key).blocks(BlockStart(**json.loads(json.dumps(asdict(start))))))
            assert rest == expected[start.documents :][: 2 * len(TEXTS)]
        assert start.epoch == 2

    @pytest.mark.parametrize("seed", range(6))
    def test_lanes_go_on_from_anywhere_whoever_reads_them(self, seed):
        draw = random.Random(seed)
        whole = Library().documents()
        expected = [[text_of(whole, lane, cursor) for cursor in range(200)] for lane in range(4)]
        cursors, position = dict.fromkeys(range(4), 0), asdict(BlockStart())
        while max(cursors.values()) < 150:
            share = 4 // draw.choice([1, 2, 4])
            positions = []
            for part in (range(first, first + share) for first in range(0, 4, share)):
                reader = Library().documents(part)
                reader.seek({lane: cursors[lane] for lane in part}, position)
                for lane in draw.choices(part, [lane + 1 for lane in part], k=draw.randrange(25)):
                    assert text_of(reader, lane, cursors[lane]) == expected[lane][cursors[lane]]
                    cursors[lane] += 1
                positions.append(reader.position({lane: cursors[lane] for lane in part}))
            position = json.loads(json.dumps(first_position(positions)))
        assert max(cursors.values()) > min(cursors.values()) + BLOCK
        assert position["epoch"] >= 1


class TestCost:
    def spread(self, documents: StreamDocuments, count: int) -> dict[int, int]:
        """Take ``count`` documents of each lane in turn; return the lanes' cursors."""
        for cursor in range(count):
            for lane in range(4):
                documents.get(lane, cursor)
        return dict.fromkeys(range(4), count)

    @pytest.mark.parametrize("progress", [1, 9, 30, 100, 1000])
    def test_a_resume_reads_at_most_a_block_again(self, progress):
        documents = Library().documents()
        cursors = self.spread(documents, progress)
        library = Library()
        resumed = library.documents()
        resumed.seek(cursors, documents.position(cursors))
        assert library.read == []
        assert text_of(resumed, 0, progress) == text_of(documents, 0, progress)
        # The block that the lanes are in, and the next if they stand at its end.
        assert len(library.read) <= 2 * BLOCK

    def test_finished_epochs_are_not_read_again(self):
        documents = Library().documents()
        cursors = self.spread(documents, 10 * len(TEXTS) // 4 + 1)
        position = documents.position(cursors)
        assert position["epoch"] >= 9
        library = Library()
        resumed = library.documents()
        resumed.seek(cursors, position)
        resumed.get(3, cursors[3])
        assert len(library.read) <= 2 * BLOCK

    def test_a_lane_that_lags_behind_is_waited_for_and_no_more(self):
        documents = Library().documents()
        self.spread(documents, 44)
        for lane in (0, 2, 3):
            for cursor in range(44, 50):
                documents.get(lane, cursor)
        cursors = {0: 50, 1: 44, 2: 50, 3: 50}
        library = Library()
        resumed = library.documents()
        resumed.seek(cursors, documents.position(cursors))
        for lane, cursor in cursors.items():
            assert text_of(resumed, lane, cursor) == text_of(documents, lane, cursor)
        assert len(library.read) <= 4 * (50 - 44) + 2 * BLOCK

    def test_a_position_is_small(self):
        documents = Library().documents()
        assert len(json.dumps(documents.position(self.spread(documents, 500)))) < 200


def test_a_process_without_lanes_has_no_position():
    documents = Library().documents(range(0))
    assert documents.position({}) is None
    documents.seek({}, None)


def test_the_position_of_several_is_the_earliest():
    early = {"epoch": 1, "block": 9, "documents": 99, "rank": 0, "place": None}
    late = {**early, "epoch": 2, "block": 3}
    assert first_position([late, early]) == first_position([early, late]) == early
    assert first_position([None, None]) is None
