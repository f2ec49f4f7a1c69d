"""`data.train: gs://...`: read, dealt out, resumed and explained like files of this machine."""

from __future__ import annotations

import gzip
import io
import json
import sys
from itertools import islice

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from fsspec.registry import _registry

from gemma_xla.checkpoint import complete
from gemma_xla.config_data import DataSection, SourceSection
from gemma_xla.data import readers
from gemma_xla.data.documents import Corpus
from gemma_xla.data.files import find_files
from gemma_xla.data.loader import TrainLoader, merge_states
from gemma_xla.data.opening import open_source
from gemma_xla.data.sources import StreamSource
from gemma_xla.data.tokenizer import load_tokenizer
from gemma_xla.errors import UserError
from gemma_xla.storage import location
from tests.bucket import Bucket, standing_in
from tests.conftest import make_texts
from tests.test_trainer import fit, untimed

FIELD = "data.train[0]"
TEXTS = [f"{i}: {'größer ' * (i % 5)}end" for i in range(30)]


@pytest.fixture(autouse=True)
def bucket(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(readers, "DELAYS", (0, 0, 0))
    with standing_in() as stand_in:
        yield stand_in


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def put_all() -> list[str]:
    """The same texts in objects of every kind."""
    table = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), table, row_group_size=7)
    contents = {
        "a.jsonl": jsonl(TEXTS),
        "a.jsonl.gz": gzip.compress(jsonl(TEXTS)),
        "a.json": json.dumps([{"text": text} for text in TEXTS], indent=2).encode(),
        "a.parquet": table.getvalue(),
        "a.txt": "\n".join(TEXTS).encode(),
    }
    return [Bucket.put(f"gs://bucket/{name}", content) for name, content in contents.items()]


def opened(path: str, **options):
    return open_source(SourceSection(path=path, **options), FIELD)


def stream(path: str) -> StreamSource:
    return opened(path, streaming=True, sample_by="line")


@pytest.mark.parametrize("streaming", [False, True])
def test_objects_of_every_kind_are_read(streaming):
    for url in put_all():
        source = opened(url, streaming=streaming, sample_by="line")
        assert list(source.texts()) == TEXTS, url
        assert source.num_documents == (None if streaming else 30)


def test_folders_and_globs():
    names = ["a/1.jsonl", "a/deep/2.jsonl", "a/deep/3.jsonl.gz", "a/.hidden/4.jsonl", "a/", "ab/5.jsonl", "a/README.md"]
    for name in names:
        Bucket.put(f"gs://bucket/{name}", b"")

    def found(path: str) -> list[str]:
        return [file.removeprefix("gs://bucket/") for file in find_files(path, FIELD)]

    assert found("gs://bucket/a") == ["a/1.jsonl", "a/README.md", "a/deep/2.jsonl", "a/deep/3.jsonl.gz"]
    assert found("gs://bucket/a/") == found("gs://bucket/a")
    assert found("gs://bucket/a/*.jsonl") == ["a/1.jsonl"]
    assert found("gs://bucket/a/**/*.jsonl*") == ["a/1.jsonl", "a/deep/2.jsonl", "a/deep/3.jsonl.gz"]
    assert found("gs://bucket/a*/5.jsonl") == ["ab/5.jsonl"]
    assert found("gs://bucket/a/1.jsonl") == ["a/1.jsonl"]
    Bucket.put("gs://bucket/set[1]/6.jsonl", b"")
    assert found("gs://bucket/set[1]") == ["set[1]/6.jsonl"]


def test_from_every_position_the_rest_is_the_same():
    for url in put_all():
        source = stream(url)
        rows = list(source.read([0]))
        for number, (_, rank, place) in enumerate(rows):
            assert list(source.read([0], rank, place)) == rows[number + 1 :], (url, number)


def test_what_came_before_is_not_fetched(bucket):
    line = jsonl(["x" * 99])
    url = Bucket.put("gs://bucket/a.jsonl", line * 200_000)
    source = stream(url)
    bucket.fetched.clear()
    start = len(line) * 199_990
    assert len(list(source.read([0], 0, start))) == 10
    assert min(begin for _, begin, _ in bucket.fetched if begin) >= start
    assert sum(end - begin for _, begin, end in bucket.fetched) < len(line) * 100_000


def test_batches_are_those_of_the_same_files_here(tmp_path, tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    for number in range(5):
        content = jsonl(make_texts(20, number))
        Bucket.put(f"gs://bucket/shards/{number}.jsonl", content)
        (tmp_path / f"{number}.jsonl").write_bytes(content)

    def loader(path: str, rows: range = range(4)) -> TrainLoader:
        config = DataSection(train={"path": path, "streaming": True}, eval_fraction=0.2, seq_len=32)
        return TrainLoader(Corpus(config, seed=0), tokenizer, num_rows=4, rows=rows)

    def ids(batches) -> list:
        return [batch["input_ids"].tolist() for batch in batches]

    with loader(str(tmp_path)) as here, loader("gs://bucket/shards/*.jsonl") as there:
        expected = ids(islice(here, 30))
        assert ids(islice(there, 30)) == expected
    # Two hosts take their shares, stop, and one goes on with both.
    hosts = [loader("gs://bucket/shards", rows) for rows in (range(2), range(2, 4))]
    halves = [ids(islice(host, 11)) for host in hosts]
    assert [a + b for a, b in zip(*halves, strict=True)] == expected[:11]
    position = json.loads(json.dumps(merge_states([host.state_dict() for host in hosts])))
    for host in hosts:
        host.close()
    with loader("gs://bucket/shards/*") as resumed:
        resumed.load_state_dict(position)
        assert ids(islice(resumed, 19)) == expected[11:]


def test_an_object_that_changed_is_read_anew():
    for word in ("one", "two"):
        Bucket.put("gs://bucket/a.txt", word.encode())
        assert list(opened("gs://bucket/a.txt").texts()) == [word]


class TestFailures:
    def test_reading_goes_on_after_the_last_document(self, bucket):
        for url in put_all():
            source = stream(url)
            bucket.failures.extend(ConnectionError("reset by peer") for _ in range(3))
            assert list(source.texts()) == TEXTS, url
            assert not bucket.failures

    def test_nothing_comes_twice_when_the_line_breaks_in_between(self, bucket):
        texts = [f"{i} " + "x" * 10_000 for i in range(2000)]
        source = stream(Bucket.put("gs://bucket/a.jsonl", jsonl(texts)))
        read = []
        for number, text in enumerate(source.texts()):
            if number in (300, 900, 1500):
                # More in all than are forgiven in a row.
                bucket.failures.extend(ConnectionError("reset by peer") for _ in range(2))
            read.append(text)
        assert read == texts and not bucket.failures

    def test_a_line_that_stays_dead(self, bucket):
        source = stream(Bucket.put("gs://bucket/a.jsonl", jsonl(TEXTS)))
        bucket.failures.extend(ConnectionError("reset by peer") for _ in range(9))
        with pytest.raises(
            UserError, match=r"^data.train\[0\].path: gs://bucket/a.jsonl cannot be read: reset by peer"
        ):
            list(source.texts())
        assert len(bucket.failures) == 5

    def test_what_waiting_does_not_mend_is_not_waited_for(self, bucket):
        source = stream(Bucket.put("gs://bucket/a.jsonl", jsonl(TEXTS)))
        bucket.failures.extend(PermissionError("no access to bucket") for _ in range(9))
        with pytest.raises(UserError, match="gs://bucket/a.jsonl cannot be read: no access to bucket"):
            list(source.texts())
        assert len(bucket.failures) == 8
        bucket.failures.clear()
        bucket.objects.clear()
        with pytest.raises(UserError, match="gs://bucket/a.jsonl cannot be read: No such file or directory"):
            list(source.texts())

    def test_mistakes_name_object_and_line(self):
        Bucket.put("gs://bucket/a.jsonl", jsonl(TEXTS) + b"{no JSON\n")
        with pytest.raises(UserError, match=r"path: gs://bucket/a.jsonl:31 is not valid JSON"):
            opened("gs://bucket/a.jsonl")
        Bucket.put("gs://bucket/b.jsonl.gz", gzip.compress(jsonl(TEXTS))[:-20])
        with pytest.raises(UserError, match="path: gs://bucket/b.jsonl.gz is cut short, damaged"):
            opened("gs://bucket/b.jsonl.gz")
        Bucket.put("gs://bucket/c.parquet", b"no parquet")
        with pytest.raises(UserError, match="path: gs://bucket/c.parquet is cut short, damaged"):
            opened("gs://bucket/c.parquet")

    @pytest.mark.parametrize("path", ["gs://bucket/none.jsonl", "gs://bucket/none", "gs://bucket/n*", "gs://other/**"])
    def test_nothing_there(self, path):
        put_all()
        with pytest.raises(UserError, match=r"^data.train\[0\].path: 'gs://.*' matches no file; check the folder"):
            opened(path)

    def test_a_bucket_that_may_not_be_seen(self, monkeypatch):
        def refuse(*_args, **_options):
            raise PermissionError("Anonymous caller does not have storage.objects.list access")

        monkeypatch.setattr(Bucket, "ls", refuse)
        with pytest.raises(
            UserError, match=r"^data.train\[0\].path: 'gs://bucket/a' cannot be read \(Anonymous caller "
        ):
            opened("gs://bucket/a")

    def test_the_package_is_missing(self, monkeypatch):
        with monkeypatch.context() as patch:
            patch.delitem(_registry, "gs")
            patch.setitem(sys.modules, "gcsfs", None)
            with pytest.raises(UserError, match=r"^data.train\[0\].path: gs://bucket/a: such URLs cannot .*gcsfs"):
                opened("gs://bucket/a")


def test_a_run_whose_data_and_folder_are_in_a_bucket_resumes(tiny_config, corpus, tmp_path):
    """The text streamed from objects, checkpoints written as objects; stopped half-way, it ends as one that was not."""
    for name in ("train", "eval"):
        Bucket.put(f"gs://bucket/data/{name}.jsonl", (corpus / f"{name}.jsonl").read_bytes())
    settings = [
        "data.train={path: 'gs://bucket/data/train*.jsonl', streaming: true}",
        "data.eval=gs://bucket/data/eval.jsonl",
        "train.steps=8",
        "checkpoint.every=4",
        "eval.every=4",
        "export.at_end=false",
    ]

    def run(name: str, *more: str):
        folder = location(f"gs://bucket/runs/{name}")
        fit(tiny_config(tmp_path / name, *settings, f"output_dir={folder}", *more))
        return folder

    whole = run("whole")
    run("halves", "train.steps=4")
    halves = run("halves")
    assert untimed(halves) == untimed(whole)
    ours, theirs = (complete(folder / "checkpoints")[-1] for folder in (halves, whole))
    assert ours.name == theirs.name == "step-00000008"
    assert (ours / "tensors-00000.safetensors").read_bytes() == (theirs / "tensors-00000.safetensors").read_bytes()
    assert (halves / "tokenizer" / "tokenizer.json").exists()
    assert not list(tmp_path.glob("*/checkpoints"))


def test_tensorboard_reads_a_run_in_a_bucket_while_it_goes_on(tiny_config, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from gemma_xla.train import Trainer

    read = {}
    step = Trainer._between_steps

    def look(trainer):
        step(trainer)
        if (url := location("gs://bucket/run/tensorboard")).exists():
            read[trainer.step] = EventAccumulator(str(url)).Reload().Tags()["scalars"]

    monkeypatch.setattr(Trainer, "_between_steps", look)
    settings = ["train.steps=3", "checkpoint.every=2", "export.at_end=false", "log.trackers=[tensorboard]"]
    fit(tiny_config(tmp_path / "run", *settings, "output_dir=gs://bucket/run"))
    assert 1 not in read and "loss" in read[2] and "loss" in read[3]
