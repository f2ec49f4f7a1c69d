from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import datasets
import numpy as np
import pytest
import torch

from gemma_xla.data.documents import IndexedDocuments
from gemma_xla.data.draws import uniform
from gemma_xla.data.packing import Document, Lane, pack
from gemma_xla.data.sources import IndexedSource, StreamSource
from gemma_xla.data.streams import Stream, StreamDocuments
from gemma_xla.errors import UserError
from gemma_xla.model.loss import IGNORE_INDEX

PAD, EOS, BOS = 0, 1, 2
LENGTHS = [3, 40, 0, 7, 1, 12, 65, 5, 9, 2, 30, 4, 0, 18, 6]


def encode(text: str) -> np.ndarray:
    """Document number n of length m is written "n m"; its tokens 1000n, 1000n + 1, ... occur nowhere else."""
    number, length = map(int, text.split())
    return np.array([BOS, *range(1000 * number + 1000, 1000 * number + 1000 + length), EOS], dtype=np.int32)


def texts_of(lengths: list[int]) -> list[str]:
    return [f"{number} {length}" for number, length in enumerate(lengths)]


def source(lengths: list[int]) -> IndexedSource:
    return IndexedSource("data.train[0]", 1.0, datasets.Dataset.from_dict({"text": texts_of(lengths)}), "text")


def stream(lanes: range) -> StreamDocuments:
    """The documents in order, again and again, for some of four lanes."""

    def shard(place: int | None) -> Iterator[tuple[str, int]]:
        for number in range(place or 0, len(LENGTHS)):
            yield texts_of(LENGTHS)[number], number + 1

    documents = Stream(StreamSource("data.train[0]", 1.0, [shard]), lambda text: True, None)
    return StreamDocuments(documents, encode, lanes, 4)


def indexed(lengths: list[int] = LENGTHS, lanes: int = 4, key: tuple | None = ("order", 0)) -> IndexedDocuments:
    return IndexedDocuments(source(lengths), np.arange(len(lengths)), encode, lanes, key)


def all_pairs(lengths: list[int] = LENGTHS) -> Counter:
    return Counter(pair for number, length in enumerate(lengths) for pair in pairwise(encode(f"{number} {length}")))


def pairs_of(batch: dict[str, torch.Tensor], row: int) -> list[tuple[int, int]]:
    pairs = zip(batch["input_ids"][row].tolist(), batch["shift_labels"][row].tolist(), strict=True)
    return [pair for pair in pairs if pair[1] != IGNORE_INDEX]


def epoch_of_documents(documents: IndexedDocuments, lanes: int, units: int, epoch: int = 0) -> list[Document]:
    places = range(epoch * units, (epoch + 1) * units)
    return [documents.get(place % lanes, place // lanes) for place in places]


class TestDocuments:
    @pytest.mark.parametrize("lanes", [1, 2, 4, 15])
    @pytest.mark.parametrize("epoch", [0, 1])
    def test_every_pair_once_per_epoch(self, lanes, epoch):
        documents = epoch_of_documents(indexed(lanes=lanes), lanes, len(LENGTHS), epoch)
        assert Counter(pair for _, tokens, _ in documents for pair in pairwise(tokens)) == all_pairs()

    @pytest.mark.parametrize("lengths", [[100], [0], [50, 3, 7]])
    def test_every_pair_once_with_fewer_documents_than_lanes(self, lengths):
        lanes = 8
        units = len(lengths) * math.ceil(lanes / len(lengths))
        documents = epoch_of_documents(indexed(lengths, lanes), lanes, units)
        assert Counter(pair for _, tokens, _ in documents for pair in pairwise(tokens)) == all_pairs(lengths)

    def test_order_depends_on_key_and_epoch(self):
        def order(key: tuple | None, epoch: int) -> list[str]:
            return [name for name, *_ in epoch_of_documents(indexed(key=key), 4, len(LENGTHS), epoch)]

        assert order(("a",), 0) == order(("a",), 0)
        assert order(("a",), 0) != order(("a",), 1)
        assert order(("a",), 0) != order(("b",), 0)
        assert order(None, 0) == order(None, 1) == [f"data.train[0] document {i}" for i in range(len(LENGTHS))]

    def test_stream_equals_index(self):
        streamed, plain = stream(range(4)), indexed(key=None)
        # One lane far ahead of the others.
        for lane, cursor in [(2, 0), (2, 1), (2, 2), (2, 3), (2, 4), (0, 0), (1, 0), (3, 0), (3, 1), (0, 1)]:
            assert streamed.get(lane, cursor).tokens.tolist() == plain.get(lane, cursor).tokens.tolist()

    def test_stream_keeps_only_what_its_lanes_will_read(self):
        texts, documents = texts_of(LENGTHS), stream(range(1, 3))
        documents.seek({1: 2, 2: 3}, documents.position({1: 2, 2: 3}))
        assert documents.get(2, 3).tokens.tolist() == encode(texts[14]).tolist()
        assert {lane: list(queue) for lane, queue in documents._waiting.items()} == {1: [texts[9], texts[13]], 2: []}


class TestLane:
    @pytest.mark.parametrize("seq_len", [1, 8, 64])
    def test_rows_hold_the_documents_pairs_in_order(self, seq_len):
        documents = indexed()
        for number in range(4):
            lane = Lane(number, [documents], [1.0], seq_len, 0)
            rows = [lane.next_row() for _ in range(200 // seq_len + 3)]
            batch = pack(rows, seq_len, PAD)
            packed = [pair for row in range(len(rows)) for pair in pairs_of(batch, row)]
            assert len(packed) == len(rows) * seq_len
            expected = [pair for cursor in range(300) for pair in pairwise(documents.get(number, cursor).tokens)]
            assert packed == expected[: len(packed)]

    def test_no_pair_crosses_documents(self):
        lane = Lane(0, [indexed()], [1.0], 32, 0)
        batch = pack([lane.next_row() for _ in range(40)], 32, PAD)
        assert set(
            map(tuple, torch.stack([batch["input_ids"], batch["shift_labels"]], -1).flatten(0, 1).tolist())
        ) <= set(all_pairs())

    def test_position_continues_in_the_middle_of_a_document(self):
        def make() -> Lane:
            return Lane(1, [indexed(), indexed([5, 200, 3])], [2.0, 1.0], 16, 7)

        lane, middles = make(), 0
        for _ in range(60):
            state = lane.state_dict()
            middles += state["offset"] > 0
            resumed = make()
            resumed.load_state_dict(state)
            expected = lane.next_row()
            row = resumed.next_row()
            assert [(name, tokens.tolist()) for name, tokens, _ in row] == [(n, t.tolist()) for n, t, _ in expected]
            assert resumed.state_dict() == lane.state_dict()
        assert middles > 20

    def test_sources_are_drawn_by_weight(self):
        # Documents of one pair: each draw fills one place.
        share, counts, draws = np.array([0.6, 0.3, 0.1]), np.zeros(3), 4000
        for number in range(4):
            documents = [indexed([0], lanes=1) for _ in share]
            lane = Lane(number, documents, [6.0, 3.0, 1.0], 500, 3)
            lane.next_row()
            lane.next_row()
            counts += lane.cursors
        assert counts.sum() == draws
        assert np.all(np.abs(counts - draws * share) < 4 * np.sqrt(draws * share * (1 - share)))

    def test_lanes_draw_independently(self):
        cursors = set()
        for number in range(8):
            lane = Lane(number, [indexed([0], lanes=1), indexed([0], lanes=1)], [1.0, 1.0], 64, 0)
            lane.next_row()
            cursors.add(tuple(lane.cursors))
        assert len(cursors) > 2


class Examples:
    """Examples number n of so many pairs, of whose tokens the last half is learnt; the same for all lanes."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def get(self, lane: int, cursor: int) -> Document:
        number = cursor % len(self.lengths)
        tokens = 1000 * (number + 1) + np.arange(self.lengths[number] + 1, dtype=np.int32)
        return Document(f"example {number}", tokens, np.arange(len(tokens)) > self.lengths[number] // 2)


def numbers(row: list[Document]) -> list[int]:
    return [int(piece.name.split()[1]) for piece in row]


class TestExampleRows:
    @pytest.mark.parametrize(
        "lengths, rows",
        [
            # The third does not fit into what is left, and begins the next row; the last fills its row.
            ([5, 4, 3, 7, 10], [[0, 1], [2, 3], [4], [0, 1]]),
            # Those without pairs are passed over, also in a full row.
            ([5, 0, 5, 0, 0, 10], [[0, 2], [5], [0, 2], [5]]),
            ([10], [[0], [0], [0], [0]]),
        ],
    )
    def test_by_hand(self, lengths, rows):
        lane = Lane(0, [Examples(lengths)], [1.0], 10, 0)
        assert [numbers(lane.next_row()) for _ in rows] == rows

    def test_without_packing_each_has_a_row(self):
        lane = Lane(0, [Examples([5, 0, 2, 10, 1])], [1.0], 10, 0, packing=False)
        assert [numbers(lane.next_row()) for _ in range(5)] == [[0], [2], [3], [4], [0]]

    @pytest.mark.parametrize("packing", [True, False])
    def test_beside_text(self, packing):
        """Text is cut, examples never; every pair once, in order; a row has room for the next, or it would be in it."""
        draw = np.random.default_rng(0)
        examples, texts = Examples(draw.integers(1, 17, 30).tolist()), indexed(lanes=1, key=None)
        lane = Lane(0, [examples, texts], [1.0, 1.0], 16, 5, packing)
        rows = [lane.next_row() for _ in range(300)]
        pieces = [piece for row in rows for piece in row]
        for number in range(30):
            found = [piece for piece in pieces if piece.name == f"example {number}"]
            assert {piece.pairs for piece in found} == {examples.lengths[number]}
        pairs = [pair for piece in pieces if piece.trained is None for pair in pairwise(piece.tokens)]
        expected = [pair for cursor in range(500) for pair in pairwise(texts.get(0, cursor).tokens)]
        assert pairs == expected[: len(pairs)]
        assert len(pairs) > 1000
        cut = 0
        for row, after in pairwise(rows):
            room = 16 - sum(piece.pairs for piece in row)
            if packing:
                assert room == 0 or after[0].trained is not None and after[0].pairs > room
            else:
                assert all(piece.trained is None for piece in row[:-1])
                assert all(piece.trained is None for piece in row) or len(row) == 1
            cut += row[-1].trained is None and after[0].name == row[-1].name
        assert cut > 20

    @pytest.mark.parametrize("packing", [True, False])
    def test_position(self, packing):
        def make() -> Lane:
            return Lane(1, [Examples([5, 0, 4, 3, 9]), indexed([5, 200, 3], lanes=1)], [2.0, 1.0], 16, 7, packing)

        lane, middles, tokens, learnt = make(), 0, 0, 0
        for _ in range(80):
            state = lane.state_dict()
            assert (state["tokens"], state["trained_tokens"]) == (tokens, learnt)
            middles += state["offset"] > 0
            resumed = make()
            resumed.load_state_dict(state)
            row, expected = resumed.next_row(), lane.next_row()
            assert [(piece.name, piece.labels.tolist()) for piece in row] == [
                (piece.name, piece.labels.tolist()) for piece in expected
            ]
            assert resumed.state_dict() == lane.state_dict()
            batch = pack([row], 16, PAD)
            tokens += int((batch["segment_ids"] > 0).sum())
            learnt += int((batch["shift_labels"] >= 0).sum())
        assert middles > 10
        assert learnt < tokens

    def test_nothing_but_examples_that_are_dropped(self):
        lane = Lane(0, [Examples([0])], [1.0], 8, 0)
        with pytest.raises(
            UserError, match=r"^example 0 and 9,999 examples before it are longer than .*\(8\); raise it"
        ):
            lane.next_row()


class TestPack:
    def test_what_is_not_learnt_has_no_label(self):
        learnt = np.array([False, False, True, True])
        rows = [[Document("a", np.array([2, 10, 11, 1]), learnt), Document("b", np.array([2, 20]), learnt[:2])]]
        batch = pack(rows, 5, PAD)
        assert batch["input_ids"].tolist() == [[2, 10, 11, 2, 0]]
        assert batch["shift_labels"].tolist() == [[-100, 11, 1, -100, -100]]
        assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0]]
        assert batch["segment_ids"].tolist() == [[1, 1, 1, 2, 0]]

    def test_by_hand(self):
        rows = [
            [Document("a", np.array([2, 10, 11, 1])), Document("b", np.array([2, 20]))],
            [Document("b", np.array([20, 21, 1]))],
            [],
        ]
        batch = pack(rows, 4, PAD)
        assert batch["input_ids"].tolist() == [[2, 10, 11, 2], [20, 21, 0, 0], [0, 0, 0, 0]]
        assert batch["shift_labels"].tolist() == [[10, 11, 1, 20], [21, 1, -100, -100], [-100] * 4]
        assert batch["position_ids"].tolist() == [[0, 1, 2, 0], [0, 1, 0, 0], [0] * 4]
        assert batch["segment_ids"].tolist() == [[1, 1, 1, 2], [1, 1, 0, 0], [0] * 4]

    def test_types_suit_the_model(self):
        batch = pack([[Document("a", np.array([2, 1]))]], 2, PAD)
        assert {name: value.dtype for name, value in batch.items()} == {
            "input_ids": torch.int32,
            "position_ids": torch.int32,
            "segment_ids": torch.int32,
            "shift_labels": torch.int64,
        }
        logits = torch.nn.functional.embedding(batch["input_ids"], torch.eye(3))
        # The padding label is left out of the loss: only token 2 -> 1 counts.
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten())
        assert loss.item() == pytest.approx(math.log(2 + math.e))


def test_uniform_is_uniform():
    values = np.array([uniform("key", number) for number in range(4000)])
    counts = np.histogram(values, bins=10, range=(0, 1))[0]
    # Chi-squared with 9 degrees of freedom: 27.9 is passed once in a thousand.
    assert ((counts - 400) ** 2 / 400).sum() < 27.9
    assert uniform("key", 1) == uniform("key", 1) != uniform("key", 2)
