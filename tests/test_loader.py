from __future__ import annotations

import copy
import gc
import gzip
import json
import random
import threading
import time
from collections.abc import Iterator
from itertools import islice

import pytest
import torch

from gemma_xla.config_data import DataSection
from gemma_xla.data.documents import Corpus
from gemma_xla.data.loader import EvalLoader, TrainLoader, merge_states
from gemma_xla.data.prefetch import prefetch
from gemma_xla.data.readers import FileReader
from gemma_xla.data.tokenizer import train_tokenizer
from gemma_xla.errors import UserError
from tests.conftest import WORDS, make_texts, write_jsonl

ROWS = 4
SEQ_LEN = 32
# Smaller than the texts are many, so that streams have several.
BLOCK = 7


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr("gemma_xla.data.streams.BLOCK", BLOCK)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    if workers():
        gc.collect()
    assert not workers()


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name, count, seed in (("many", 60, 1), ("few", 10, 2), ("one", 1, 3)):
        write_jsonl(folder / f"{name}.jsonl", make_texts(count, seed))
    (folder / "shards").mkdir()
    for number, count in enumerate((9, 1, 17)):
        file = write_jsonl(folder / "shards" / f"{number}.jsonl", make_texts(count, 10 + number))
        file.with_suffix(".jsonl.gz").write_bytes(gzip.compress(file.read_bytes()))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(make_texts(60, 1), 540, tmp_path_factory.mktemp("tokenizer") / "t")


@pytest.fixture(params=["map", "stream", "mixed"])
def config(request, folder) -> DataSection:
    many, few = {"path": f"{folder}/many.jsonl"}, {"path": f"{folder}/few.jsonl", "weight": 0.3}
    folder_of_shards = {"path": f"{folder}/shards/*.jsonl.gz", "weight": 0.7}
    train = {
        "map": [many],
        "stream": [{**many, "streaming": True}],
        "mixed": [{**many, "weight": 2.0}, {**few, "streaming": True}, {**folder_of_shards, "streaming": True}],
    }[request.param]
    return DataSection(train=train, eval_fraction=0.2, seq_len=SEQ_LEN, prefetch=3)


def train_loader(config: DataSection, tokenizer, rows: range = range(ROWS), seed: int = 0) -> TrainLoader:
    return TrainLoader(Corpus(config, seed=seed), tokenizer, num_rows=ROWS, rows=rows)


def hosts(count: int) -> list[range]:
    share = ROWS // count
    return [range(host * share, (host + 1) * share) for host in range(count)]


def take(loaders: list[TrainLoader], count: int) -> list[dict[str, torch.Tensor]]:
    """The next global batches, put together from those of each host."""
    batches = []
    for _ in range(count):
        parts = [next(loader) for loader in loaders]
        batches.append({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    return batches


def assert_equal(left: list[dict[str, torch.Tensor]], right: list[dict[str, torch.Tensor]]) -> None:
    assert len(left) == len(right)
    for ours, theirs in zip(left, right, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def documents_in(batches: Iterator[dict[str, torch.Tensor]], tokenizer) -> list[str]:
    """Texts of the documents of rows that follow each other, told apart by their last token."""
    texts, tokens = [], []
    for batch in batches:
        for token in batch["shift_labels"].flatten().tolist():
            if token == tokenizer.eos_token_id:
                texts.append(tokenizer.decode(tokens))
                tokens = []
            elif token != -100:
                tokens.append(token)
    assert not tokens
    return texts


class TestTraining:
    def test_shape_and_no_padding(self, config, tokenizer):
        with train_loader(config, tokenizer) as loader:
            for batch in islice(loader, 20):
                assert {value.shape for value in batch.values()} == {(ROWS, SEQ_LEN)}
                assert (batch["segment_ids"] > 0).all()
                assert (batch["shift_labels"] >= 0).all()
            assert loader.stats()["tokens"] == 20 * ROWS * SEQ_LEN

    @pytest.mark.parametrize("count", [2, 4])
    def test_batches_do_not_depend_on_the_number_of_hosts(self, config, tokenizer, count):
        with train_loader(config, tokenizer) as one:
            expected = take([one], 60)
            documents = one.stats()["documents"]
        many = [train_loader(config, tokenizer, rows) for rows in hosts(count)]
        assert_equal(take(many, 60), expected)
        assert sum(loader.stats()["documents"] for loader in many) == documents > 70
        for loader in many:
            loader.close()

    def test_going_back_and_pausing(self, config, tokenizer):
        with train_loader(config, tokenizer) as loader:
            start = loader.state_dict()
            expected = take([loader], 12)
            loader.load_state_dict(start)
            first = take([loader], 5)
            loader.close()
            assert_equal(first + take([loader], 7), expected)

    def test_seed_decides(self, config, tokenizer):
        with (
            train_loader(config, tokenizer) as a,
            train_loader(config, tokenizer) as b,
            train_loader(config, tokenizer, seed=1) as c,
        ):
            first = take([a], 5)
            assert_equal(first, take([b], 5))
            assert not torch.equal(first[0]["input_ids"], next(c)["input_ids"])

    def test_a_stream_in_order_gives_the_batches_of_its_file(self, folder, tokenizer):
        batches = []
        for streaming in (False, True):
            source = {"path": f"{folder}/many.jsonl", "streaming": streaming}
            config = DataSection(train=[source], eval_fraction=0.0, seq_len=SEQ_LEN, shuffle=False)
            with train_loader(config, tokenizer) as loader:
                batches.append(take([loader], 80))
                assert loader.stats()["documents"] > 120  # more than two epochs
        assert_equal(*batches)

    def test_rows_of_a_single_document_differ(self, folder, tokenizer):
        config = DataSection(train=f"{folder}/one.jsonl", eval_fraction=0.0, seq_len=8)
        with train_loader(config, tokenizer) as loader:
            assert len({tuple(row) for row in next(loader)["input_ids"].tolist()}) == ROWS

    def test_describe_names_the_documents_of_the_last_batch(self, folder, tokenizer):
        config = DataSection(train=f"{folder}/many.jsonl", eval_fraction=0.0, seq_len=2, shuffle=False)
        with train_loader(config, tokenizer, range(2, 4)) as loader:
            assert loader.describe() == ""
            next(loader)
            assert loader.describe() == "row 2: data.train[0] document 2\nrow 3: data.train[0] document 3"


class TestResume:
    @pytest.mark.parametrize("seed", range(3))
    def test_an_interrupted_run_sees_the_batches_of_one_that_is_not(self, config, tokenizer, seed):
        """Interrupted anywhere, by crashes and not, on other numbers of hosts, with other numbers of batches ahead."""
        draw, total = random.Random(seed), 150
        with train_loader(config, tokenizer) as loader:
            expected = take([loader], total)
        state, done, middles = None, 0, 0
        while done < total:
            changed = config.model_copy(update={"prefetch": draw.randint(1, 4)})
            loaders = [train_loader(changed, tokenizer, rows) for rows in hosts(draw.choice([1, 2, 4]))]
            for loader in loaders:
                if state is not None:
                    loader.load_state_dict(state)
            count = min(draw.randint(1, 30), total - done)
            assert_equal(take(loaders, count), expected[done : done + count])
            done += count
            state = json.loads(json.dumps(merge_states(loader.state_dict() for loader in loaders)))
            assert state["batches"] == done
            middles += any(lane["offset"] for lane in state["lanes"].values())
            for loader in loaders:
                loader.close()
        assert middles > 3, "no document was in progress"
        assert all(stream is None or stream["epoch"] > 0 for stream in state["streams"])

    @pytest.mark.parametrize("batches", [5, 90, 1500])
    def test_a_resume_does_not_read_what_is_done(self, folder, tokenizer, monkeypatch, batches):
        config = DataSection(train=[{"path": f"{folder}/many.jsonl", "streaming": True}], seq_len=8, prefetch=1)
        with train_loader(config, tokenizer) as loader:
            take([loader], batches)
            state = loader.state_dict()
            expected = take([loader], 1)
        read, plain = [], FileReader.read

        def spying(self: FileReader, file: str, start: int | None = None) -> Iterator[tuple[str, int]]:
            return (read.append(row) or row for row in plain(self, file, start))

        with train_loader(config, tokenizer) as resumed:
            monkeypatch.setattr(FileReader, "read", spying)
            resumed.load_state_dict(state)
            assert read == []
            assert_equal(take([resumed], 1), expected)
            assert state["streams"][0]["epoch"] >= {5: 0, 90: 1, 1500: 20}[batches]
        # What lies between the first lane and the last, and a block before and after; the batches made ahead.
        cursors = [lane["cursors"][0] for lane in state["lanes"].values()]
        assert len(read) <= (max(cursors) - min(cursors) + 1) * ROWS + 2 * BLOCK + 3 * ROWS

    def test_the_size_of_a_position_does_not_grow(self, config, tokenizer):
        with train_loader(config, tokenizer) as loader:
            sizes = []
            for _ in range(2):
                take([loader], 100)
                sizes.append(len(json.dumps(loader.state_dict())))
        assert sizes[1] < sizes[0] + 20
        assert sizes[1] < 1500


class TestEvaluation:
    def test_train_and_eval_share_out_the_documents(self, config, tokenizer, folder):
        corpus = Corpus(config, seed=0)
        loader = EvalLoader(corpus, tokenizer, num_rows=ROWS, rows=range(ROWS))
        held_out = documents_in(loader, tokenizer)
        everything = make_texts(60, 1)
        if len(config.train) == 3:
            everything += make_texts(10, 2) + make_texts(9, 10) + make_texts(1, 11) + make_texts(17, 12)
        trained = list(corpus.texts())
        assert sorted([*trained, *held_out]) == sorted(everything)
        assert 2 <= len(held_out) <= 30

        # What the lanes train on, over several epochs, is exactly what is not held out.
        trained_on = set()
        for row in range(ROWS):
            with train_loader(config, tokenizer, range(row, row + 1)) as lane:
                labels = torch.cat([next(lane)["shift_labels"].flatten() for _ in range(150)]).tolist()
            end = len(labels) - labels[::-1].index(tokenizer.eos_token_id)
            trained_on |= set(documents_in([{"shift_labels": torch.tensor(labels[:end])}], tokenizer))
        assert trained_on == set(trained)

    def test_every_document_once_in_order(self, folder, tokenizer):
        config = DataSection(
            train=f"{folder}/one.jsonl", eval=[f"{folder}/few.jsonl", f"{folder}/one.jsonl"], seq_len=16
        )
        loader = EvalLoader(Corpus(config, seed=0), tokenizer, num_rows=ROWS, rows=range(ROWS))
        expected = make_texts(10, 2) + make_texts(1, 3)
        assert documents_in(loader, tokenizer) == expected
        # Again, from the start.
        assert documents_in(loader, tokenizer) == expected
        pairs = sum(len(tokenizer(text)["input_ids"]) for text in expected)  # bos, but no eos: as many as pairs
        positions = -(-pairs // (16 * ROWS)) * 16 * ROWS
        assert loader.stats() == {"tokens": pairs, "padding": pytest.approx(1 - pairs / positions)}

    def test_hosts_see_equally_many_batches_of_one_shape(self, folder, tokenizer):
        config = DataSection(train=f"{folder}/one.jsonl", eval=f"{folder}/one.jsonl", seq_len=8)
        corpus = Corpus(config, seed=0)
        whole = list(EvalLoader(corpus, tokenizer, num_rows=8, rows=range(8)))
        parts = [list(EvalLoader(corpus, tokenizer, num_rows=8, rows=range(row, row + 2))) for row in (0, 2, 4, 6)]
        joined = [
            {name: torch.cat([part[name] for part in each]) for name in each[0]} for each in zip(*parts, strict=True)
        ]
        assert_equal(joined, whole)
        assert all(batch["input_ids"].shape == (8, 8) for batch in whole)
        # A short text leaves whole rows empty.
        assert (whole[-1]["segment_ids"] == 0).all(dim=1).any()

    def test_nothing_held_out_on_request(self, folder):
        config = DataSection(train=f"{folder}/few.jsonl", eval_fraction=0.0)
        corpus = Corpus(config, seed=0)
        assert not corpus.has_eval
        assert sorted(corpus.texts()) == sorted(make_texts(10, 2))

    def test_a_small_fraction_holds_out_one_and_a_large_one_leaves_one(self, folder, tokenizer):
        for fraction, count in ((1e-9, 1), (1 - 1e-9, 9)):
            corpus = Corpus(DataSection(train=f"{folder}/few.jsonl", eval_fraction=fraction, seq_len=8), seed=0)
            loader = EvalLoader(corpus, tokenizer, num_rows=2, rows=range(2))
            assert len(documents_in(loader, tokenizer)) == count
            assert len(list(corpus.texts())) == 10 - count


def examples_in(batches: list[dict[str, torch.Tensor]], tokenizer) -> list[tuple[str, str]]:
    """What is read and what is learnt of each example, told apart by the numbers of a row's segments."""
    found = []
    for batch in batches:
        for row in range(len(batch["input_ids"])):
            for segment in range(1, int(batch["segment_ids"][row].max()) + 1):
                here = batch["segment_ids"][row] == segment
                ids, labels = batch["input_ids"][row][here].tolist(), batch["shift_labels"][row][here].tolist()
                learnt = [label for label in labels if label >= 0]
                assert batch["position_ids"][row][here].tolist() == list(range(len(ids)))
                assert ids[0] == tokenizer.bos_token_id
                assert labels == [-100] * (len(labels) - len(learnt)) + learnt
                read = ids[1 : len(ids) - len(learnt) + 1]
                found.append((tokenizer.decode(read), tokenizer.decode(learnt)))
    return found


class TestExamples:
    COUNT = 40

    @pytest.fixture(scope="class")
    def pairs(self) -> list[tuple[str, str]]:
        draw = random.Random(7)
        return [(f"{i}: ", " ".join(draw.choices(WORDS, k=draw.choice([1, 3, 8])))) for i in range(self.COUNT)]

    @pytest.fixture(scope="class")
    def file(self, pairs, tmp_path_factory):
        file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
        records = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        return file

    @pytest.fixture(params=["indexed", "streamed", "mixed", "unpacked"])
    def settings(self, request, file, folder) -> DataSection:
        streamed, text = {"path": str(file), "streaming": True}, {"path": f"{folder}/many.jsonl", "weight": 0.5}
        train = {"streamed": [streamed], "mixed": [str(file), streamed, text]}.get(request.param, [str(file)])
        packing = request.param != "unpacked"
        return DataSection(train=train, eval_fraction=0.1, seq_len=SEQ_LEN, packing=packing)

    def test_an_epoch_holds_each_example_once_and_whole(self, file, pairs, tokenizer):
        for packing in (True, False):
            config = DataSection(train=str(file), eval_fraction=0.0, seq_len=SEQ_LEN, packing=packing)
            found = []
            for row in range(ROWS):
                with train_loader(config, tokenizer, range(row, row + 1)) as loader:
                    found += examples_in(take([loader], self.COUNT), tokenizer)[: self.COUNT // ROWS]
            assert sorted(found) == sorted((prompt, f"{completion}<eos>") for prompt, completion in pairs)

    def test_stats_are_measured(self, settings, tokenizer):
        with train_loader(settings, tokenizer) as loader:
            batches = take([loader], 30)
            stats = loader.stats()
        tokens = sum(int((batch["segment_ids"] > 0).sum()) for batch in batches)
        learnt = sum(int((batch["shift_labels"] >= 0).sum()) for batch in batches)
        assert (stats["tokens"], stats["trained_tokens"]) == (tokens, learnt)
        assert stats["padding"] == pytest.approx(1 - tokens / (30 * ROWS * SEQ_LEN))
        assert 0 < stats["padding"] < 0.8
        assert 0 < learnt < tokens

    @pytest.mark.parametrize("seed", range(2))
    def test_an_interrupted_run_sees_the_batches_of_one_that_is_not(self, settings, tokenizer, seed):
        draw, total = random.Random(seed), 60
        with train_loader(settings, tokenizer) as loader:
            expected, stats = take([loader], total), loader.stats()
        state, done = None, 0
        while done < total:
            loaders = [train_loader(settings, tokenizer, rows) for rows in hosts(draw.choice([1, 2, 4]))]
            for loader in loaders:
                if state is not None:
                    loader.load_state_dict(state)
            count = min(draw.randint(1, 15), total - done)
            assert_equal(take(loaders, count), expected[done : done + count])
            done += count
            state = json.loads(json.dumps(merge_states(loader.state_dict() for loader in loaders)))
            for loader in loaders:
                loader.close()
        with train_loader(settings, tokenizer) as loader:
            loader.load_state_dict(state)
            assert loader.stats() == stats

    def test_fewer_examples_than_lanes_are_repeated_whole(self, tmp_path, tokenizer):
        records = [{"prompt": f"{i}: ", "completion": "he was in it"} for i in range(3)]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        config = DataSection(train=f"{tmp_path}/a.jsonl", eval_fraction=0.0, seq_len=SEQ_LEN, packing=False)
        with train_loader(config, tokenizer) as loader:
            found = examples_in(take([loader], 3), tokenizer)
        # Twelve rows: four epochs.
        assert sorted(found) == sorted([(f"{i}: ", "he was in it<eos>") for i in range(3)] * 4)

    def test_evaluation(self, settings, file, pairs, tokenizer):
        config = settings.model_copy(update={"eval": DataSection(train=str(file)).train})
        loader = EvalLoader(Corpus(config, seed=0), tokenizer, num_rows=ROWS, rows=range(ROWS))
        batches = list(loader)
        assert examples_in(batches, tokenizer) == [(prompt, f"{completion}<eos>") for prompt, completion in pairs]
        assert loader.stats()["tokens"] == sum(int((batch["shift_labels"] >= 0).sum()) for batch in batches)
        if not config.packing:
            assert len(batches) == self.COUNT // ROWS

    def test_too_long_examples_are_dropped(self, file, pairs, tokenizer):
        config = DataSection(train=str(file), eval=str(file), seq_len=8, too_long="drop")
        corpus = Corpus(config, seed=0)
        fit = [
            (p, f"{c}<eos>") for p, c in pairs if len(tokenizer(p)["input_ids"]) + len(tokenizer(c)["input_ids"]) <= 9
        ]
        assert 5 < len(fit) < self.COUNT
        assert examples_in(EvalLoader(corpus, tokenizer, num_rows=2, rows=range(2)), tokenizer) == fit
        with TrainLoader(corpus, tokenizer, num_rows=2, rows=range(2)) as loader:
            assert set(examples_in(take([loader], 40), tokenizer)) == set(fit)

    def test_a_tokenizer_is_trained_on_what_they_say(self, file, pairs):
        texts = Corpus(DataSection(train=str(file), eval_fraction=0.0), seed=0).texts()
        assert sorted(texts) == sorted(f"{prompt}\n{completion}" for prompt, completion in pairs)


class TestMistakes:
    def test_nothing_to_hold_out(self, folder):
        with pytest.raises(UserError, match="data.eval_fraction is 0.01, but data.train is a single document"):
            Corpus(DataSection(train=f"{folder}/one.jsonl"), seed=0)

    def test_stream_without_held_out_documents(self, folder, tokenizer):
        source = {"path": f"{folder}/few.jsonl", "streaming": True}
        corpus = Corpus(DataSection(train=[source], eval_fraction=1e-9, seq_len=8), seed=0)
        with pytest.raises(UserError, match="no document was held out"):
            list(EvalLoader(corpus, tokenizer, num_rows=2, rows=range(2)))

    def test_stream_without_training_documents(self, folder, tokenizer):
        source = {"path": f"{folder}/few.jsonl", "streaming": True}
        loader = train_loader(DataSection(train=[source], eval_fraction=1 - 1e-9, seq_len=8), tokenizer)
        for _ in range(2):  # the second time, too: an ended iteration would look like an ended epoch
            with pytest.raises(UserError, match="no document is left to train on"):
                next(loader)

    def test_source_is_named(self, folder):
        config = DataSection(train=[f"{folder}/few.jsonl", f"{folder}/nothing.jsonl"])
        with pytest.raises(UserError, match=r"^data.train\[1\].path: "):
            Corpus(config, seed=0)
        config = DataSection(train=f"{folder}/few.jsonl", eval=f"{folder}/nothing.jsonl")
        with pytest.raises(UserError, match=r"^data.eval\[0\].path: "):
            Corpus(config, seed=0)

    def test_position_of_another_run(self, folder, tokenizer):
        config = DataSection(train=f"{folder}/few.jsonl", seq_len=8)
        state = train_loader(config, tokenizer, seed=1).state_dict()
        with pytest.raises(UserError, match="has seed 1, but this run has 0"):
            train_loader(config, tokenizer).load_state_dict(state)

    @pytest.mark.parametrize("streaming", [False, True])
    def test_position_of_other_text(self, tmp_path, tokenizer, streaming):
        texts = make_texts(10, 5)
        config = DataSection(train=[{"path": f"{tmp_path}/a.jsonl", "streaming": streaming}], seq_len=8)
        write_jsonl(tmp_path / "a.jsonl", texts)
        state = train_loader(config, tokenizer).state_dict()
        write_jsonl(tmp_path / "a.jsonl", [texts[0][::-1], *texts[1:]])
        with pytest.raises(UserError, match=r"^data.train\[0\]: its text is not that of the saved position"):
            train_loader(config, tokenizer).load_state_dict(state)

    def test_position_of_text_that_moved(self, tmp_path, tokenizer):
        for name in ("here", "there"):
            (tmp_path / name).mkdir()
            write_jsonl(tmp_path / name / "a.jsonl", make_texts(10, 5))
        here, there = (DataSection(train=f"{tmp_path}/{name}", seq_len=8) for name in ("here", "there"))
        with train_loader(here, tokenizer) as loader, train_loader(there, tokenizer) as moved:
            take([loader], 3)
            moved.load_state_dict(loader.state_dict())
            assert_equal(take([moved], 3), take([loader], 3))

    def test_position_of_another_version(self, folder, tokenizer):
        config = DataSection(train=f"{folder}/few.jsonl", seq_len=8)
        state = train_loader(config, tokenizer).state_dict()
        del state["setup"]["content"], state["streams"]
        with pytest.raises(UserError, match="is of another version of gemma_xla; continue with that version, or start"):
            train_loader(config, tokenizer).load_state_dict(state)

    def test_position_of_another_chat_template(self, tmp_path, tokenizer):
        chat = {"messages": [{"role": "user", "content": "he"}, {"role": "assistant", "content": "was"}]}
        (tmp_path / "a.jsonl").write_text(json.dumps(chat))
        config = DataSection(train=f"{tmp_path}/a.jsonl", eval_fraction=0.0, seq_len=8)
        state = train_loader(config, tokenizer).state_dict()
        other = copy.copy(tokenizer)
        other.chat_template = tokenizer.chat_template + "\n"
        with pytest.raises(UserError, match="the saved position has chat_template .*, but this run has .*; continue"):
            train_loader(config, other).load_state_dict(state)

    def test_position_of_one_host_only(self, folder, tokenizer):
        config = DataSection(train=f"{folder}/few.jsonl", seq_len=8)
        state = train_loader(config, tokenizer, range(2)).state_dict()
        with pytest.raises(UserError, match=r"lacks rows \[2, 3\]"):
            train_loader(config, tokenizer).load_state_dict(state)


class TestPrefetch:
    def test_an_exception_comes_after_the_items_before_it(self):
        def failing() -> Iterator[int]:
            yield from (1, 2, 3)
            raise RuntimeError("disk on fire")

        items, seen = prefetch(failing(), 2), []
        with pytest.raises(RuntimeError, match="disk on fire"):
            for item in items:
                seen.append(item)
        assert seen == [1, 2, 3]
        assert not workers()

    def test_it_works_ahead_but_not_without_bound(self):
        made = []
        items = prefetch((made.append(i) or i for i in range(100)), 3)
        assert next(items) == 0
        deadline = time.monotonic() + 10
        # One delivered, three ready, one waiting for room.
        while len(made) < 5 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        assert made == [0, 1, 2, 3, 4]
        items.close()
        assert not workers()

    def test_failure_inside_a_loader_reaches_the_consumer_and_leaves_the_position(self, folder, tokenizer, monkeypatch):
        config = DataSection(train=f"{folder}/few.jsonl", seq_len=8, prefetch=1)
        with train_loader(config, tokenizer) as loader, train_loader(config, tokenizer) as reference:
            take([loader], 3)
            with monkeypatch.context() as patch:
                patch.setattr("gemma_xla.data.loader.pack", lambda *_: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    take([loader], 5)
            done = loader.state_dict()["batches"]
            assert done < 8
            expected = take([reference], done + 2)[done:]
            assert_equal(take([loader], 2), expected)

    def test_threads_end(self, folder, tokenizer):
        # Enough to evaluate on that the thread is not done by itself.
        config = DataSection(train=f"{folder}/few.jsonl", eval=f"{folder}/many.jsonl", seq_len=8)
        loader = train_loader(config, tokenizer)
        next(loader)
        assert len(workers()) == 1
        loader.close()
        assert not workers()
        # Forgotten loaders, and evaluations that stop early.
        next(loader)
        del loader
        gc.collect()
        assert not workers()
        batches = iter(EvalLoader(Corpus(config, seed=0), tokenizer, num_rows=1, rows=range(1)))
        next(batches)
        assert len(workers()) == 1
        del batches
        gc.collect()
        assert not workers()
