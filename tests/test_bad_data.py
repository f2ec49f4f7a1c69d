"""Data as it should not be: one line says where and what, nothing hangs, and nothing is written beside it.

Text that is odd but sound trains: see `TestSound`.
"""

from __future__ import annotations

import gc
import gzip
import io
import json
import re
import shutil
import threading
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from gemma_xla.config_data import DataSection
from gemma_xla.data.documents import Corpus
from gemma_xla.data.loader import EvalLoader, TrainLoader
from gemma_xla.data.tokenizer import check_tokenizer, load_tokenizer, train_tokenizer
from gemma_xla.errors import UserError
from gemma_xla.model.config import GemmaConfig
from tests.conftest import make_texts

GOOD = make_texts(40, 1)
LINES = [json.dumps({"id": i, "text": text}) for i, text in enumerate(GOOD)]
Files = dict[str, bytes]


def jsonl(line: str | bytes | None = None, at: int = 30) -> bytes:
    """Good records; ``line`` becomes the line number ``at``."""
    lines = [text.encode() for text in LINES]
    if line is not None:
        lines[at - 1] = line if isinstance(line, bytes) else line.encode()
    return b"\n".join(lines) + b"\n"


def parquet_file(**columns: list) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), file, row_group_size=10)
    return file.getvalue()


def cut(data: bytes, share: float = 0.6) -> bytes:
    return data[: int(len(data) * share)]


def damaged(data: bytes) -> bytes:
    return data[:40] + bytes(200) + data[240:]


# What it is: the files, what of the config is not as usual, and what the message has to say after the field's name.
CASES: dict[str, tuple[Files, dict, str]] = {
    "a line that is no JSON": (
        {"a.jsonl": jsonl('{"text": "he was in" and so on')},
        {},
        r"path: {folder}/a\.jsonl:30 is not valid JSON \(Expecting ',' delimiter, column 22\): "
        r"'{\"text\": \"he was in\" and so on'; correct or remove it",
    ),
    "a last line cut short": (
        {"a.jsonl": jsonl()[:-20]},
        {},
        r"path: {folder}/a\.jsonl:40 is not valid JSON \(Unterminated string .*\): '{\"id\": 39, .*'; correct or",
    ),
    "the second of two files": (
        {"a.jsonl": jsonl(), "b.jsonl": jsonl("{", at=3)},
        {},
        r"path: {folder}/b\.jsonl:3 is not valid JSON",
    ),
    "a line in a compressed file": (
        {"a.jsonl.gz": gzip.compress(jsonl("no"))},
        {},
        r"path: {folder}/a\.jsonl\.gz:30 is not valid JSON",
    ),
    "blank lines count": ({"a.jsonl": b"\n\n" + jsonl("no")}, {}, r"path: {folder}/a\.jsonl:32 is not valid JSON"),
    "a line that is a list": (
        {"a.jsonl": jsonl('["text", "he was"]')},
        {},
        r"""path: {folder}/a\.jsonl:30 holds no record but '\["text", "he was"\]'; write it as {"text": "..."}""",
    ),
    "a line that is a text": (
        {"a.jsonl": jsonl('"he was"')},
        {},
        r"""path: {folder}/a\.jsonl:30 holds no record but '"he was"'""",
    ),
    "a line nested too deeply": (
        {"a.jsonl": jsonl('{"text": ' + "[" * 100_000)},
        {},
        r"path: {folder}/a\.jsonl:30 is not valid JSON \(.*recursion.*\): '{\"text\": \[\[\[.* \.\.\.'",
    ),
    "a record without the column": (
        {"a.jsonl": jsonl('{"txt": "he was"}')},
        {},
        r"column: {folder}/a\.jsonl:30 has no column 'text' \(did you mean 'txt'\?\); it has txt$",
    ),
    "a record of nothing": ({"a.jsonl": jsonl("{}")}, {}, r"column: {folder}/a\.jsonl:30 .*'text'; it has none$"),
    "no record has the column": (
        {"a.jsonl": jsonl()},
        {"column": "body"},
        r"column: {folder}/a\.jsonl:1 has no column 'body'; it has id, text$",
    ),
    "a number for a text": (
        {"a.jsonl": jsonl('{"text": 42}')},
        {},
        r"column: column 'text' of {folder}/a\.jsonl:30 holds int, not text: '42'; name another column or correct",
    ),
    "a list for a text": (
        {"a.jsonl": jsonl('{"text": ["he", "was"]}')},
        {},
        r"column: column 'text' of {folder}/a\.jsonl:30 holds list, not text",
    ),
    "half a character": (
        {"a.jsonl": jsonl(r'{"text": "he \ud83d was"}')},
        {},
        r"path: {folder}/a\.jsonl:30 holds half a surrogate pair, '\\ud83d', which is no character",
    ),
    "a line that is not UTF-8": (
        {"a.jsonl": jsonl('{"text": "größer"}'.encode("latin-1"))},
        {},
        r"path: {folder}/a\.jsonl:30 is not UTF-8 text \(byte 0xf6\); convert the file or leave it out$",
    ),
    "a list of records with one that is none": (
        {"a.json": json.dumps([{"text": "he was"}] * 5 + [7]).encode()},
        {},
        r"path: {folder}/a\.json, record 6 holds no record but '7'",
    ),
    "a list of records cut short": (
        {"a.json": b'[\n {"text": "he was"},\n {"text": "in'},
        {},
        r"path: {folder}/a\.json:3 is not valid JSON \(Unterminated string.*\): ' {\"text\": \"in'",
    ),
    "a record over several lines": (
        {"a.json": json.dumps({"text": "he was"}, indent=1).encode()},
        {},
        r"path: {folder}/a\.json:1 is not valid JSON \(.*\): '{'; .* a file holds a record per line, or one list",
    ),
    "text that is not UTF-8": (
        {"a.txt": b"he was\n" * 30 + "größer\n".encode("latin-1")},
        {},
        r"path: {folder}/a\.txt:31 is not UTF-8 text \(byte 0xf6\)",
    ),
    "a line of text that is not UTF-8": (
        {"a.txt": b"he was\n" * 30 + "größer\n".encode("utf-16")},
        {"sample_by": "line"},
        r"path: {folder}/a\.txt:31 is not UTF-8 text \(byte 0xff\)",
    ),
    "a picture among texts": (
        {"a.txt": b"he was", "b.png": b"\x89PNG\r\n\x1a\n"},
        {},
        r"path: {folder}/b\.png:1 is not UTF-8 text \(byte 0x89\); convert the file or leave it out",
    ),
    "parquet cut short": (
        {"a.parquet": cut(parquet_file(text=GOOD))},
        {},
        r"path: {folder}/a\.parquet is cut short, damaged, or of another kind than its name says: Parquet magic bytes",
    ),
    "parquet that is something else": (
        {"a.parquet": jsonl()},
        {},
        r"path: {folder}/a\.parquet is cut short, damaged, or of another kind than its name says",
    ),
    "parquet of no bytes": ({"a.parquet": b""}, {}, r"path: {folder}/a\.parquet is cut short.* size is 0 bytes"),
    "parquet damaged inside": (
        {"a.parquet": damaged(parquet_file(text=GOOD))},
        {},
        r"path: {folder}/a\.parquet (cannot be read|is cut short, damaged)",
    ),
    "parquet without the column": (
        {"a.parquet": parquet_file(txt=GOOD, n=list(range(40)))},
        {},
        r"column: {folder}/a\.parquet has no column 'text' \(did you mean 'txt'\?\); it has txt, n$",
    ),
    "parquet of numbers": (
        {"a.parquet": parquet_file(text=GOOD), "b.parquet": parquet_file(text=[None, None, 1.5])},
        {},
        r"column: column 'text' of {folder}/b\.parquet, row 3 holds float, not text: '1\.5'",
    ),
    "parquet of bytes": (
        {"a.parquet": parquet_file(text=[b"he"])},
        {},
        r"column: column 'text' of {folder}/a\.parquet, row 1 holds bytes, not text",
    ),
    "gzip cut short": (
        {"a.txt.gz": cut(gzip.compress("\n".join(GOOD).encode()))},
        {},
        r"path: {folder}/a\.txt\.gz is cut short, damaged, .* Compressed file ended before",
    ),
    "records in gzip cut short": (
        {"a.jsonl.gz": cut(gzip.compress(jsonl()))},
        {},
        r"path: {folder}/a\.jsonl\.gz is cut short, damaged, .* Compressed file ended before",
    ),
    "gzip that is none": (
        {"a.txt.gz": b"he was in"},
        {},
        r"path: {folder}/a\.txt\.gz is cut short, damaged, .*: Not a gzipped file",
    ),
    "files of no bytes": (
        {"a.jsonl": b"", "b.jsonl": b""},
        {},
        r"path: there are no documents in '{folder}'; name text that is not empty$",
    ),
    "texts without text": (
        {"a.jsonl": b'{"text": ""}\n{"text": null}\n{"text": " \\n\\t"}\n' * 50},
        {},
        r"path: there are no documents in '{folder}'",
    ),
    "lines without text": (
        {"a.txt": b"\n \n\t\n" * 50},
        {"sample_by": "line"},
        r"path: there are no documents in '{folder}'",
    ),
    "parquet without text": (
        {"a.parquet": parquet_file(text=["", None] * 50)},
        {},
        r"path: there are no documents in ",
    ),
    "parquet without rows": (
        {"a.parquet": parquet_file(text=pyarrow.array([], "string"))},
        {},
        r"path: there are no documents in ",
    ),
    "an empty list of records": ({"a.json": b"[]"}, {}, r"path: there are no documents in '{folder}'"),
    "an empty folder": ({}, {}, r"path: '{folder}' matches no file; check the folder or pattern$"),
    "hidden files only": ({".a.txt": b"he was"}, {}, r"path: '{folder}' matches no file"),
    "files of several kinds": (
        {"a.jsonl": jsonl(), "README.md": b"About it"},
        {},
        r"path: it holds files of several kinds \(json, text\); name one, such as 'folder/\*\*/\*\.jsonl'",
    ),
    "a pattern without a match": (
        {"a.jsonl": jsonl()},
        {"path": "{folder}/*.txt"},
        r"path: '{folder}/\*\.txt' matches no file",
    ),
    "a file that is not there": (
        {"a.jsonl": jsonl()},
        {"path": "{folder}/b.jsonl"},
        r"path: there is no file or folder '{folder}/b\.jsonl'; check the path$",
    ),
    "a folder that is named as a file": (
        {"a.jsonl/.keep": b""},
        {"path": "{folder}/a.jsonl"},
        r"path: '{folder}/a\.jsonl' matches no file",
    ),
    "a split of files": ({"a.jsonl": jsonl()}, {"split": "test"}, r": 'subset' and 'split' are for hub data sets"),
    "a data set that is not there": (
        {},
        {"path": "no-one/no-such-data"},
        r"path: no local file is called 'no-one/no-such-data', and it could not be opened .*; check the name, the net",
    ),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(GOOD, 540, tmp_path_factory.mktemp("tokenizer") / "t")


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.fixture(autouse=True)
def no_trace(folder):
    """No thread goes on, and the inputs are as they were."""
    yield
    if workers():
        gc.collect()
    assert not workers()
    assert [path.name for path in folder.parent.iterdir()] == ["data"]


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def write(folder: Path, files: Files) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)


def train(folder: Path, tokenizer, **source) -> None:
    """Go twice through the text, and once through what is held out."""
    source = {"path": str(folder), **source}
    source["path"] = source["path"].replace("{folder}", str(folder))
    config = DataSection(train=[source], eval_fraction=0.1, seq_len=64, prefetch=1)
    corpus = Corpus(config, seed=0)
    with TrainLoader(corpus, tokenizer, num_rows=2, rows=range(2)) as loader:
        while loader.stats()["documents"] < 80:
            next(loader)
    list(EvalLoader(corpus, tokenizer, num_rows=2, rows=range(2)))


def message(call: Callable, *args, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    return str(error.value)


def listing(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("streaming", [False, True], ids=["indexed", "streamed"])
@pytest.mark.parametrize("case", CASES)
def test_bad_data(case, streaming, folder, tokenizer):
    files, source, expected = CASES[case]
    write(folder, files)
    before = listing(folder)
    found = message(train, folder, tokenizer, streaming=streaming, **source)
    pattern = expected.replace("{folder}", re.escape(str(folder)))
    assert re.match(r"data\.train\[0\]\.?" + pattern, found), found
    assert listing(folder) == before


def test_the_source_at_fault_is_named(folder, tokenizer):
    write(folder, {"a.jsonl": jsonl(), "b.jsonl": jsonl("no")})
    for field in ("train", "eval"):
        paths = {"train": [f"{folder}/a.jsonl"], "eval": [f"{folder}/a.jsonl"]}
        paths[field].append(f"{folder}/b.jsonl")
        assert message(Corpus, DataSection(**paths), seed=0).startswith(f"data.{field}[1].path: {folder}/b.jsonl:30 ")


def test_a_stream_meets_a_bad_line_in_the_middle_of_training(folder, tokenizer):
    """The batches before it are delivered; a run that goes on from them finds it again, until it is mended."""
    lines = LINES * 70
    lines[2440] = "{"
    (folder / "a.jsonl").write_text("\n".join(lines))
    source = {"path": f"{folder}/a.jsonl", "streaming": True}
    config = DataSection(train=[source], eval_fraction=0.0, seq_len=64, shuffle=False)

    def loader() -> TrainLoader:
        return TrainLoader(Corpus(config, seed=0), tokenizer, num_rows=2, rows=range(2))

    stopped, again, mended = loader(), loader(), loader()
    found = message(lambda: list(stopped))
    assert found.startswith(f"data.train[0].path: {folder}/a.jsonl:2441 is not valid JSON")
    assert stopped.stats()["documents"] > 1500
    again.load_state_dict(stopped.state_dict())
    assert message(next, again) == found
    (folder / "a.jsonl").write_text("\n".join(LINES * 70))
    mended.load_state_dict(again.state_dict())
    with mended:
        while mended.stats()["documents"] < 3000:
            next(mended)


def test_links_to_nothing(folder, tokenizer):
    write(folder, {"a.txt": b"he was"})
    (folder / "b.txt").symlink_to(folder / "gone.txt")
    expected = f"data.train[0].path: {folder}/b.txt is a link to a file that is not there; mend or remove it"
    for path in ("{folder}", "{folder}/b.txt", "{folder}/*.txt"):
        assert message(train, folder, tokenizer, path=path) == expected


def test_a_file_that_vanishes_while_it_is_needed(folder, tokenizer):
    write(folder, {"a.jsonl": jsonl(), "b.jsonl": jsonl()})
    config = DataSection(train=[{"path": str(folder), "streaming": True}], shuffle=False, seq_len=64)
    loader = TrainLoader(Corpus(config, seed=0), tokenizer, num_rows=2, rows=range(2))
    (folder / "b.jsonl").unlink()
    found = message(lambda: list(loader))
    assert found == f"data.train[0].path: {folder}/b.jsonl cannot be read: No such file or directory"


class TestSound:
    """Odd text trains, and comes out as it went in."""

    @pytest.mark.parametrize("streaming", [False, True], ids=["indexed", "streamed"])
    @pytest.mark.parametrize(
        "texts",
        [
            ["he was \0 in", "\0", "\ufffd\ufeff\u2028 \x1b[0m"],
            ["he was in it " * 20_000, "short"],
            ["x" * 100_000, "short"],
            ["<bos><eos><pad>", "<start_of_turn>"],
        ],
        ids=["control characters", "a long document", "a long word", "names of special tokens"],
    )
    def test_text(self, folder, tokenizer, texts, streaming):
        (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        source = {"path": str(folder), "streaming": streaming}
        corpus = Corpus(DataSection(train=[source], eval_fraction=0.0, seq_len=1024), seed=0)
        with TrainLoader(corpus, tokenizer, num_rows=1, rows=range(1)) as loader:
            for batch in islice(loader, 3):
                assert (batch["segment_ids"] > 0).all()
        assert sorted(corpus.texts()) == sorted(texts)

    def test_a_tokenizer_of_control_characters(self, folder):
        texts = ["he was \0 in\r\n", "\x07\x1b"] * 20
        tokenizer = train_tokenizer(texts, 490, folder / "t")
        shutil.rmtree(folder / "t")
        assert tokenizer.decode(tokenizer(texts[0], add_special_tokens=False)["input_ids"]) == texts[0]


class TestTokenizer:
    @pytest.mark.parametrize(
        "change, expected",
        [
            (lambda f: (f / "tokenizer.json").write_text("{"), r"cannot be read: tokenizer\.json: .*; copy the folder"),
            (lambda f: (f / "tokenizer.json").write_text("{}"), r"cannot be read: .*; copy the folder anew"),
            (lambda f: (f / "tokenizer_config.json").write_text(""), r"cannot be read: tokenizer_config\.json: "),
            (
                lambda f: (f / "tokenizer_config.json").unlink(),
                r"has no bos_token; use a tokenizer of the Gemma family",
            ),
            (lambda f: [file.unlink() for file in f.iterdir()], r"cannot be read: "),
            (
                lambda f: [(f / "tokenizer.json").unlink(), (f / "tokenizer.model").unlink()],
                r"has no vocabulary; it needs tokenizer\.json or tokenizer\.model",
            ),
            (
                lambda f: [(f / "tokenizer.json").unlink(), (f / "tokenizer.model").write_bytes(b"none")],
                r"cannot be read: ",
            ),
            (
                lambda f: [
                    (f / "tokenizer.json").unlink(),
                    (f / "tokenizer_config.json").write_text('{"tokenizer_class": "CanineTokenizer"}'),
                ],
                r"has no fast tokenizer \(tokenizer\.json\)",
            ),
        ],
        ids=["cut", "not one", "settings cut", "no settings", "empty", "no vocabulary", "no model", "slow"],
    )
    def test_files(self, folder, tokenizer, change, expected):
        tokenizer.save_pretrained(folder)
        (folder / "tokenizer.model").write_bytes(Path(tokenizer.name_or_path, "tokenizer.model").read_bytes())
        change(folder)
        found = message(load_tokenizer, folder)
        assert found.startswith("data.tokenizer: ")
        assert str(folder) in found
        assert re.search(expected, found), found

    @pytest.mark.parametrize("token", ["bos_token", "eos_token", "pad_token"])
    def test_special_tokens(self, folder, tokenizer, token):
        tokenizer.save_pretrained(folder)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(
            json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast", token: None})
        )
        assert f"has no {token}; use a tokenizer" in message(load_tokenizer, folder)

    def test_of_more_tokens_than_the_model(self, tokenizer):
        found = message(check_tokenizer, tokenizer, GemmaConfig(vocab_size=512))
        assert "540 tokens but the model's vocab_size is 512; set model.overrides.vocab_size=540" in found

    def test_not_there(self, folder):
        assert "'no-one/none' is neither a folder" in message(load_tokenizer, "no-one/none")
