from __future__ import annotations

import gzip
import json
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from gemma_xla.config import SourceSection
from gemma_xla.data.sources import find_files, is_local, open_source
from gemma_xla.errors import UserError

FIELD = "data.train[0]"
TEXTS = ["first\n\tdocument\n", "zweites Dokument, größer", "third: 日本語 🙂"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write_texts(folder: Path, suffix: str = ".txt") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(TEXTS):
        (folder / f"{number}{suffix}").write_text(text, encoding="utf-8")
    return folder


def write_jsonl(file: Path, column: str = "text") -> Path:
    file.write_text("".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(TEXTS)))
    return file


def documents(path: Path | str, **options) -> list[str]:
    source = open_source(SourceSection(path=str(path), **options), FIELD)
    streamed = list(source.stream())
    if source.num_documents is not None:
        assert [source.text(i) for i in range(source.num_documents)] == streamed
    return streamed


@pytest.mark.parametrize("streaming", [False, True])
class TestFormats:
    def test_a_text_file_is_one_document(self, tmp_path, streaming):
        file = write_texts(tmp_path) / "0.txt"
        assert documents(file, streaming=streaming) == TEXTS[:1]

    def test_folder(self, tmp_path, streaming):
        write_texts(tmp_path / "corpus" / "deep", ".md")
        (tmp_path / "corpus" / ".hidden").write_text("hidden")
        assert documents(tmp_path / "corpus", streaming=streaming) == TEXTS

    def test_glob(self, tmp_path, streaming):
        write_texts(tmp_path / "a" / "b", ".py")
        write_texts(tmp_path / "a", ".log")
        assert documents(tmp_path / "**" / "*.py", streaming=streaming) == TEXTS

    def test_gzip(self, tmp_path, streaming):
        with gzip.open(tmp_path / "a.txt.gz", "wt", encoding="utf-8") as file:
            file.write(TEXTS[2])
        assert documents(tmp_path / "a.txt.gz", streaming=streaming) == TEXTS[2:]

    def test_gzipped_jsonl(self, tmp_path, streaming):
        plain = write_jsonl(tmp_path / "plain.jsonl")
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
        assert documents(tmp_path / "a.jsonl.gz", streaming=streaming) == TEXTS

    def test_jsonl(self, tmp_path, streaming):
        file = write_jsonl(tmp_path / "a.jsonl", column="body")
        assert documents(file, column="body", streaming=streaming) == TEXTS

    def test_parquet(self, tmp_path, streaming):
        table = pyarrow.table({"n": [1, 2, 3], "text": TEXTS})
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
        assert documents(tmp_path / "a.parquet", streaming=streaming) == TEXTS

    def test_names_that_look_like_patterns(self, tmp_path, streaming):
        write_texts(tmp_path / "set[1]")
        assert documents(tmp_path / "set[1]", streaming=streaming) == TEXTS


def test_folder_of_several_kinds_is_refused(tmp_path):
    """Read as text, the braces of its records would be learnt."""
    (tmp_path / "a.jsonl").write_text('{"text": "a record"}')
    (tmp_path / "README.md").write_text("About it")
    with pytest.raises(UserError, match=r"several kinds \(json, text\); name one"):
        documents(tmp_path)
    assert documents(f"{tmp_path}/*.jsonl") == ["a record"]


def test_missing_values_are_empty_documents(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": null}\n')
    assert documents(tmp_path / "a.jsonl") == ["a", ""]


def test_stdlib_leaves_out_what_is_not_the_library():
    files = find_files("{stdlib}/**/*.py", FIELD)
    root = Path(sysconfig.get_path("stdlib"))
    parts = {part for file in files for part in Path(file).relative_to(root).parts}
    assert {"json", "asyncio", "argparse.py"} <= parts
    assert not parts & {"site-packages", "test", "tests", "idlelib"}
    assert list(files) == sorted(files)


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_texts(tmp_path / "corpus")
    assert documents("~/corpus") == TEXTS


def test_local_paths_and_hub_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path / "corpus")
    for path in ("corpus", "/a", "./a", "../a", "~/a", "{stdlib}", "a/*", "a.txt", "a/b.jsonl", "a.parquet", "a.gz"):
        assert is_local(path), path
    for path in ("wikitext", "HuggingFaceFW/fineweb", "roneneldan/TinyStories"):
        assert not is_local(path), path


def test_stream_is_shuffled_by_seed_and_epoch(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": str(i)}) + "\n" for i in range(50)))
    source = open_source(SourceSection(path=str(tmp_path / "a.jsonl"), streaming=True), FIELD)
    assert source.num_documents is None
    first = list(source.stream(0, seed=1))
    assert sorted(first, key=int) == list(source.stream()) == [str(i) for i in range(50)]
    assert first == list(source.stream(0, seed=1))
    assert first != list(source.stream(1, seed=1))
    assert first != list(source.stream(0, seed=2))


def test_threads_can_read_one_stream_side_by_side(tmp_path):
    for shard in range(40):
        lines = [json.dumps({"text": f"{shard}-{i}"}) + "\n" for i in range(3)]
        (tmp_path / f"{shard:03}.jsonl").write_text("".join(lines))
    source = open_source(SourceSection(path=str(tmp_path), streaming=True), FIELD)
    expected = [f"{shard}-{i}" for shard in range(40) for i in range(3)]
    # Threads take turns as often as they can, so that each meets the others between two files.
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            read = list(pool.map(lambda _: list(source.stream()), range(16)))
    finally:
        sys.setswitchinterval(interval)
    assert read == [expected] * 16


def test_progress_bars_come_back(tmp_path):
    datasets.enable_progress_bars()
    documents(write_jsonl(tmp_path / "a.jsonl"))
    assert not datasets.are_progress_bars_disabled()


class TestMistakes:
    def message(self, path: Path | str, **options) -> str:
        with pytest.raises(UserError) as error:
            documents(path, **options)
        assert str(error.value).startswith(FIELD)
        assert "\n" not in str(error.value)
        return str(error.value)

    def test_missing_file(self, tmp_path):
        assert "no file or folder" in self.message(tmp_path / "nothing.txt")

    def test_no_match(self, tmp_path):
        assert "matches no file" in self.message(tmp_path / "*.txt")

    @pytest.mark.parametrize("streaming", [False, True])
    def test_not_utf8(self, tmp_path, streaming):
        write_texts(tmp_path)
        (tmp_path / "latin1.txt").write_bytes("größer".encode("latin-1"))
        message = self.message(tmp_path, streaming=streaming)
        assert str(tmp_path / "latin1.txt") in message
        assert "UTF-8" in message

    @pytest.mark.parametrize("streaming", [False, True])
    def test_no_documents(self, tmp_path, streaming):
        (tmp_path / "a.jsonl").touch()
        assert "no documents" in self.message(tmp_path / "a.jsonl", streaming=streaming)

    @pytest.mark.parametrize("streaming", [False, True])
    def test_wrong_column(self, tmp_path, streaming):
        message = self.message(write_jsonl(tmp_path / "a.jsonl"), column="txt", streaming=streaming)
        assert "'txt' (did you mean 'text'?)" in message
        assert "it has id, text" in message

    def test_column_without_text(self, tmp_path):
        assert "holds int, not text" in self.message(write_jsonl(tmp_path / "a.jsonl"), column="id")

    def test_broken_json(self, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text":')
        assert f"reading {tmp_path}/a.jsonl failed" in self.message(tmp_path / "a.jsonl")

    def test_split_of_a_file(self, tmp_path):
        assert "remove them" in self.message(write_jsonl(tmp_path / "a.jsonl"), split="test")

    @pytest.mark.parametrize("streaming", [False, True])
    def test_hub_out_of_reach(self, monkeypatch, streaming):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        message = self.message("no-one/no-such-data", streaming=streaming)
        assert "'no-one/no-such-data'" in message
        assert "check the name, the network" in message


def test_sample_by_decides_what_a_document_is(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("one\ntwo\n\nthree\n")
    counts = {
        unit: open_source(SourceSection(path=str(path), sample_by=unit), "data.train[0]").num_documents
        for unit in ("document", "paragraph", "line")
    }
    assert counts == {"document": 1, "paragraph": 2, "line": 4}
