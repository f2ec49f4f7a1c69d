from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from gemma_xla.config_data import DataSection
from gemma_xla.data.documents import Corpus
from gemma_xla.data.loader import TrainLoader
from gemma_xla.data.sources import IndexedSource
from gemma_xla.data.survey import Survey, steps_of_epochs, survey
from gemma_xla.errors import UserError
from tests.conftest import WORDS, make_texts, write_jsonl
from tests.test_chat import TURNS

COUNT = 37


@pytest.fixture
def tokenizer(tokenizer_folder):
    return AutoTokenizer.from_pretrained(tokenizer_folder)


def write(file: Path, records: list[dict]) -> str:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


@pytest.fixture
def pairs(tmp_path) -> str:
    draw = random.Random(3)
    records = [
        {"prompt": f"{i}: ", "completion": " ".join(draw.choices(WORDS, k=draw.choice([1, 3, 9])))}
        for i in range(COUNT)
    ]
    return write(tmp_path / "pairs.jsonl", records)


def looked_at(tokenizer, **options) -> tuple[Corpus, Survey]:
    corpus = Corpus(DataSection(**{"eval_fraction": 0.0, **options}), seed=1)
    return corpus, survey(corpus, tokenizer)


class TestSurvey:
    def test_by_hand(self, tokenizer, tmp_path):
        # The bytes of "z" are tokens: with bos and eos, 3 + n tokens, of which 2 + n are predicted.
        records = [{"prompt": "z", "completion": "z" * length} for length in (1, 4, 9)]
        train = write(tmp_path / "a.jsonl", records)
        _, found = looked_at(tokenizer, train=train, seq_len=512)
        assert found.describe() == "data.train: 3 examples, 20 tokens, 17 of them trained"
        _, found = looked_at(tokenizer, train=train, seq_len=6)
        assert found.describe() == (
            "data.train: 3 examples, 15 tokens, 12 of them trained; 1 truncated, 0 dropped (data.seq_len 6, the "
            "longest has 12 tokens)"
        )
        assert found.lengths[0].tolist() == [4, 7, 7]
        _, found = looked_at(tokenizer, train=train, eval=train, seq_len=6, too_long="drop")
        assert found.describe().split("\n") == [
            f"{name}: 3 examples, 9 tokens, 7 of them trained; 0 truncated, 1 dropped (data.seq_len 6, the longest has "
            "12 tokens)"
            for name in ("data.train", "held out")
        ]
        assert found.lengths[0].tolist() == [4, 7, 1]

    def test_it_counts_what_the_loader_delivers(self, tokenizer, pairs):
        corpus, found = looked_at(tokenizer, train=pairs, seq_len=16, packing=False)
        with TrainLoader(corpus, tokenizer, num_rows=1, rows=range(1)) as loader:
            for _ in range(COUNT):
                next(loader)
            assert loader.stats()["tokens"] == found.train.tokens
            assert loader.stats()["trained_tokens"] == found.train.trained_tokens
        assert found.train.truncated > 0

    def test_what_is_held_out_counts_apart(self, tokenizer, pairs):
        _, found = looked_at(tokenizer, train=pairs, eval_fraction=0.3, seq_len=64)
        assert found.train.examples + found.held_out.examples == COUNT
        assert found.held_out.examples > 3
        _, whole = looked_at(tokenizer, train=pairs, seq_len=64)
        assert found.train.tokens + found.held_out.tokens == whole.train.tokens

    def test_text_and_streams_are_left_alone(self, tokenizer, tmp_path, pairs, monkeypatch):
        text = str(write_jsonl(tmp_path / "text.jsonl", make_texts(9, 1)))
        corpus = Corpus(DataSection(train=[text, {"path": pairs, "streaming": True}], eval=text), seed=0)
        monkeypatch.setattr(IndexedSource, "text", lambda *_: 1 / 0)
        for source in corpus.train_sources:
            object.__setattr__(source, "shards", None)
        assert survey(corpus, tokenizer).describe() == ""

    def test_a_bad_example_is_found_before_training(self, tokenizer, tmp_path):
        records = [{"messages": TURNS}] * 3 + [{"messages": [{"role": "system", "content": "a"}, *TURNS]}]
        bad = write(tmp_path / "a.jsonl", records)
        for options, field in (({"train": bad}, "train"), ({"train": bad, "eval_fraction": 0.999}, "train")):
            with pytest.raises(
                UserError, match=rf"^data.{field}\[0\]: the chat .* for {bad}:4: Gemma has no system role"
            ):
                looked_at(tokenizer, **options)
        good = write(tmp_path / "good.jsonl", records[:3])
        with pytest.raises(UserError, match=rf"^data.eval\[0\]: the chat template cannot be used for {bad}:4: "):
            looked_at(tokenizer, train=good, eval=bad)

    def test_chats_without_a_template(self, tokenizer, tmp_path, pairs):
        tokenizer.chat_template = None
        chats = {"path": write(tmp_path / "chats.jsonl", [{"messages": TURNS}]), "streaming": True}
        for options, field in (({"train": [chats]}, "train"), ({"train": pairs, "eval": [chats]}, "eval")):
            with pytest.raises(UserError, match=rf"^data.{field}\[0\]: it holds chats, but the tokenizer has no chat"):
                looked_at(tokenizer, **options)

    def test_nothing_left_to_learn(self, tokenizer, tmp_path):
        records = [{"prompt": "z" * length, "completion": "he"} for length in (1, 9)]
        train = write(tmp_path / "a.jsonl", records)
        with pytest.raises(
            UserError, match=rf"of {train}:2 nothing is left to learn: .* takes 10 tokens, and .* is 9; "
        ):
            looked_at(tokenizer, train=train, seq_len=9)
        looked_at(tokenizer, train=train, seq_len=10)

    def test_everything_dropped(self, tokenizer, pairs):
        with pytest.raises(UserError) as error:
            looked_at(tokenizer, train=pairs, seq_len=2, too_long="drop")
        assert "all of its 37 examples are longer than data.seq_len (2) and dropped; the longest has" in str(
            error.value
        )
        assert str(error.value).startswith("data.train[0]: ")


class TestStepsPerEpoch:
    @pytest.mark.parametrize("rows", [1, 3, 4, 5, 6, 50])
    @pytest.mark.parametrize(
        "options", [{}, {"packing": False}, {"too_long": "drop", "seq_len": 9}, {"shuffle": False}]
    )
    def test_after_so_many_batches_every_lane_is_through(self, tokenizer, pairs, rows, options):
        corpus, found = looked_at(tokenizer, train=pairs, **{"seq_len": 16, **options})
        steps = steps_of_epochs(corpus, found, rows)
        through = []
        for row in range(rows):
            share = len(range(row, COUNT, rows))
            with TrainLoader(corpus, tokenizer, num_rows=rows, rows=range(row, row + 1)) as loader:
                taken = 0
                while loader.stats()["documents"] < share:
                    next(loader)
                    taken += 1
            through.append(taken)
        assert steps == max(through)
        if options.get("packing") is False:
            assert steps == -(-COUNT // rows)
            # No batch is rounded up but the last.
            assert steps_of_epochs(corpus, found, rows, 2.5) == -(-math.ceil(2.5 * COUNT) // rows)

    def test_text(self, tokenizer, tmp_path):
        texts = make_texts(30, 2)
        train = str(write_jsonl(tmp_path / "text.jsonl", texts))
        corpus, found = looked_at(tokenizer, train=train, seq_len=16)
        pairs = sum(len(tokenizer(text)["input_ids"]) for text in texts)
        assert steps_of_epochs(corpus, found, 1) == -(-pairs // 16)
        one = str(write_jsonl(tmp_path / "one.jsonl", ["he was " * 100]))
        corpus, found = looked_at(tokenizer, train=one, seq_len=16)
        pairs = len(tokenizer("he was " * 100)["input_ids"])
        # A document for four lanes is in parts of about equal length.
        assert steps_of_epochs(corpus, found, 4) in (-(-pairs // 64), -(-pairs // 64) + 1)

    def test_several_sources(self, tokenizer, tmp_path, pairs):
        text = str(write_jsonl(tmp_path / "text.jsonl", make_texts(30, 2)))
        train = [{"path": pairs, "weight": 3.0}, text]
        corpus, found = looked_at(tokenizer, train=train, seq_len=32)
        steps = steps_of_epochs(corpus, found, 2)
        with TrainLoader(corpus, tokenizer, num_rows=2, rows=range(2)) as loader:
            for _ in range(steps - 1):
                next(loader)
            assert min(sum(lane["cursors"]) for lane in loader.state_dict()["lanes"].values()) < (COUNT + 30) / 2
            next(loader)
            assert loader.stats()["documents"] >= COUNT + 30

    def test_streams_have_no_end(self, tokenizer, pairs):
        corpus, found = looked_at(tokenizer, train=[{"path": pairs, "streaming": True}])
        with pytest.raises(UserError, match=r"^train.epochs: data.train\[0\] is a stream, .*; set train.steps instead"):
            steps_of_epochs(corpus, found, 2)
