from __future__ import annotations

import gzip
import json
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from gemma_xla.config_data import SourceSection
from gemma_xla.data.files import are_files, find_files
from gemma_xla.data.hub import from_dataset
from gemma_xla.data.opening import open_source
from gemma_xla.data.readers import FileReader
from gemma_xla.data.sources import StreamSource
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
    streamed = list(source.texts())
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


BLANK = ["", " ", "\n\t", "\u3000", None]


@pytest.mark.parametrize("streaming", [False, True])
class TestBlankDocuments:
    """Without text a document would only teach the model to say nothing: it does not count as one."""

    def test_records(self, tmp_path, streaming):
        texts = [*BLANK, "a", *BLANK, "b"]
        (tmp_path / "a.jsonl").write_text("\n".join(["", *(json.dumps({"text": text}) for text in texts), "", "\r\n"]))
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
        (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in texts], indent=1))
        for name in ("a.jsonl", "a.parquet", "a.json"):
            assert documents(tmp_path / name, streaming=streaming) == ["a", "b"]

    def test_files_and_lines(self, tmp_path, streaming):
        (tmp_path / "a.txt").touch()
        (tmp_path / "b.txt").write_text("\n one\r\ntwo \n\n \nthree")
        assert documents(tmp_path, streaming=streaming) == ["\n one\ntwo \n\n \nthree"]
        assert documents(tmp_path, streaming=streaming, sample_by="line") == [" one", "two ", "three"]
        assert documents(tmp_path, streaming=streaming, sample_by="paragraph") == [" one\ntwo ", "three"]

    def test_hub(self, streaming):
        dataset = datasets.Dataset.from_dict({"text": [*BLANK, "a", *BLANK, "b"]})
        source = from_dataset(dataset.to_iterable_dataset() if streaming else dataset, SourceSection(path="x/y"), FIELD)
        assert list(source.texts()) == ["a", "b"]
        assert source.num_documents == (None if streaming else 2)


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("größer", encoding="utf-8-sig")
    (tmp_path / "a.jsonl").write_text('{"text": "größer"}\n', encoding="utf-8-sig")
    assert documents(tmp_path / "a.txt") == documents(tmp_path / "a.jsonl") == ["größer"]


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
        assert are_files(path), path
    for path in ("wikitext", "HuggingFaceFW/fineweb", "roneneldan/TinyStories"):
        assert not are_files(path), path


def write_all(folder: Path) -> dict[str, StreamSource]:
    """The same 30 texts of each length in files of every kind, and as a data set of the hub."""
    folder.mkdir()
    texts = [f"{i}: {'größer ' * (i % 5)}end" for i in range(30)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "a.jsonl").write_text(lines)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "a.json").write_text(json.dumps([{"text": text} for text in texts], indent=2))
    (folder / "a.txt").write_text("\n\n".join(texts))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "a.parquet", row_group_size=7)
    found = {name: stream(folder / name) for name in ("a.jsonl", "a.jsonl.gz", "a.json", "a.parquet")}
    found |= {unit: stream(folder / "a.txt", sample_by=unit) for unit in ("line", "paragraph")}
    hub = datasets.load_dataset("parquet", data_files=str(folder / "a.parquet"), split="train", streaming=True)
    return found | {"hub": from_dataset(hub, SourceSection(path="x/y"), FIELD)}


def stream(path: Path, **options) -> StreamSource:
    return open_source(SourceSection(path=str(path), streaming=True, **options), FIELD)


KINDS = ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet", "line", "paragraph", "hub"]


class TestReadingOn:
    @pytest.mark.parametrize("kind", KINDS)
    def test_from_every_position_the_rest_is_the_same(self, tmp_path, kind):
        source = write_all(tmp_path / "here")[kind]
        rows = list(source.read([0]))
        assert len(rows) == 30
        for number, (_, rank, place) in enumerate(rows):
            rest = list(source.read([0], rank, json.loads(json.dumps(place))))
            assert [text for text, *_ in rest] == [text for text, *_ in rows[number + 1 :]]
            assert rest == rows[number + 1 :] or kind == "hub"  # whose positions also tell where reading began

    def test_over_several_files(self, tmp_path):
        for number in range(6):
            write_jsonl(tmp_path / f"{number}.jsonl")
        source, order = stream(tmp_path), [3, 0, 5, 1, 4, 2]
        rows = list(source.read(order))
        assert [text for text, *_ in rows] == TEXTS * 6
        for number, (_, rank, place) in enumerate(rows):
            assert list(source.read(order, rank, place)) == rows[number + 1 :]

    def test_what_came_before_is_not_read(self, tmp_path):
        (tmp_path / "a.jsonl").write_text("this is no JSON\n" * 1000 + '{"text": "a"}\n')
        reader = FileReader(FIELD, "json")
        assert [text for text, _ in reader.read(str(tmp_path / "a.jsonl"), 16 * 1000)] == ["a"]
        # Damage in a group of rows that is passed over stays unseen.
        pyarrow.parquet.write_table(
            pyarrow.table({"text": [f"{i} {i * i}" for i in range(2000)]}), tmp_path / "a.parquet", row_group_size=1000
        )
        damaged = bytearray((tmp_path / "a.parquet").read_bytes())
        damaged[4:200] = bytes(196)
        (tmp_path / "a.parquet").write_bytes(damaged)
        reader = FileReader(FIELD, "parquet")
        assert len(list(reader.read(str(tmp_path / "a.parquet"), 1000))) == 1000
        with pytest.raises(UserError, match="a.parquet"):
            list(reader.read(str(tmp_path / "a.parquet")))


class TestHub:
    def stream(self, texts: list, failing: bool = False) -> StreamSource:
        def rows() -> Iterator[dict]:
            for text in texts:
                yield {"text": text}
            if failing:
                raise ConnectionError("the line is dead\nas a door-nail")

        return from_dataset(datasets.IterableDataset.from_generator(rows), SourceSection(path="x/y"), FIELD)

    @pytest.mark.parametrize("streaming", [False, True])
    def test_columns_are_checked(self, streaming):
        dataset = datasets.Dataset.from_dict({"txt": ["a"], "n": [1]})
        dataset = dataset.to_iterable_dataset() if streaming else dataset
        with pytest.raises(
            UserError, match=r"column: 'x/y' has no column 'text' \(did you mean 'txt'\?\); it has txt, n"
        ):
            from_dataset(dataset, SourceSection(path="x/y"), FIELD)
        with pytest.raises(UserError, match=r"column: column 'n' of 'x/y' holds Value\('int64'\), not text"):
            from_dataset(dataset, SourceSection(path="x/y", column="n"), FIELD)

    def test_rows_of_streams_are_checked(self):
        with pytest.raises(UserError, match="column 'text' of shard 0 holds int, not text"):
            list(self.stream(["a", 1]).texts())

    def test_a_connection_that_breaks(self):
        read = []
        with pytest.raises(
            UserError, match=r"^data.train\[0\].path: reading shard 0 .* failed: the line is dead; check"
        ):
            read.extend(self.stream(["a", "b"], failing=True).texts())
        assert read == ["a", "b"]


class TestContent:
    @pytest.mark.parametrize("kind", KINDS)
    def test_it_is_that_of_the_text_wherever_it_lies(self, tmp_path, kind):
        here, there = (write_all(tmp_path / name)[kind] for name in ("here", "there"))
        assert here.content == there.content

    @pytest.mark.parametrize("streaming", [False, True])
    def test_other_text_of_the_same_length_has_another(self, tmp_path, streaming):
        found = set()
        for word in ("one", "two"):
            (tmp_path / "a.jsonl").write_text(f'{{"text": "{word}"}}\n{{"text": "end"}}\n')
            # As quick a change as can be: the file's size stays, and its time may.
            found.add(open_source(SourceSection(path=str(tmp_path / "a.jsonl"), streaming=streaming), FIELD).content)
        assert len(found) == 2

    def test_a_file_that_changed_is_read_anew(self, tmp_path):
        for word in ("one", "two"):
            (tmp_path / "a.txt").write_text(word)
            assert documents(tmp_path / "a.txt") == [word]


@pytest.mark.parametrize("hub", [False, True])
def test_threads_can_read_one_stream_side_by_side(tmp_path, hub):
    for shard in range(40):
        lines = [json.dumps({"text": f"{shard}-{i}"}) + "\n" for i in range(3)]
        (tmp_path / f"{shard:03}.jsonl").write_text("".join(lines))
    if hub:
        files = sorted(map(str, tmp_path.iterdir()))
        dataset = datasets.load_dataset("json", data_files=files, split="train", streaming=True)
        source = from_dataset(dataset, SourceSection(path="x/y"), FIELD)
        assert len(source.shards) == 40
    else:
        source = stream(tmp_path)
    expected = [f"{shard}-{i}" for shard in range(40) for i in range(3)]
    # Threads take turns as often as they can, so that each meets the others between two files.
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            read = list(pool.map(lambda _: list(source.texts()), range(8)))
    finally:
        sys.setswitchinterval(interval)
    assert read == [expected] * 8


def test_progress_bars_come_back(tmp_path):
    datasets.enable_progress_bars()
    documents(write_jsonl(tmp_path / "a.jsonl"))
    assert not datasets.are_progress_bars_disabled()
