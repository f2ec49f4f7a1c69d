"""Records of every kind of file, and of the hub: what is taken from them, and what is refused."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from gemma_xla.config_data import SourceSection
from gemma_xla.data.hub import from_dataset
from gemma_xla.data.opening import open_source
from gemma_xla.data.records import plain_text
from gemma_xla.data.sources import Source
from gemma_xla.errors import UserError

FIELD = "data.train[0]"
USER, ASSISTANT = {"role": "user", "content": "größe?"}, {"role": "assistant", "content": "12 cm"}
PAIRS = [{"prompt": f"{i}: ", "completion": f"größe\n{i}", "id": i} for i in range(5)]
CHATS = [{"messages": [{**USER, "content": f"{i}?"}, ASSISTANT], "source": "here"} for i in range(5)]
KINDS = ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet", "hub"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def opened(folder: Path, kind: str, records: list[dict], **options) -> Source:
    """A source that holds the records; in files of lines, a blank line comes first."""
    if kind == "hub":
        dataset = datasets.Dataset.from_list(records)
        section = SourceSection(path="x/y", **options)
        return from_dataset(dataset.to_iterable_dataset() if section.streaming else dataset, section, FIELD)
    lines = "\n" + "".join(json.dumps(record) + "\n" for record in records)
    file = folder / kind
    if kind == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), file, row_group_size=2)
    elif kind == "a.json":
        file.write_text(json.dumps(records, indent=1))
    else:
        file.write_bytes(gzip.compress(lines.encode()) if kind.endswith(".gz") else lines.encode())
    return open_source(SourceSection(path=str(file), **options), FIELD)


def refused(call, *args, **options) -> str:
    with pytest.raises(UserError) as error:
        source = call(*args, **options)
        list(source.texts())
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    return str(error.value)


@pytest.mark.parametrize("streaming", [False, True], ids=["indexed", "streamed"])
@pytest.mark.parametrize("kind", KINDS)
class TestKinds:
    def test_pairs(self, tmp_path, kind, streaming):
        source = opened(tmp_path, kind, PAIRS, streaming=streaming)
        assert source.format == "prompt_completion"
        assert list(source.texts()) == [f'{{"prompt":"{i}: ","completion":"größe\\n{i}"}}' for i in range(5)]
        assert source.num_documents == (None if streaming else 5)

    def test_chats(self, tmp_path, kind, streaming):
        source = opened(tmp_path, kind, CHATS, streaming=streaming)
        assert source.format == "messages"
        assert list(source.texts()) == [
            f'{{"messages":[{{"role":"user","content":"{i}?"}},{{"role":"assistant","content":"12 cm"}}]}}'
            for i in range(5)
        ]

    def test_columns_of_other_names(self, tmp_path, kind, streaming):
        records = [{"question": "a", "answer": "b", "text": "c", "turns": [USER, ASSISTANT]}]
        options = {"streaming": streaming, "prompt": "question", "completion": "answer", "messages": "turns"}
        pair = opened(tmp_path, kind, records, format="prompt_completion", **options)
        assert list(pair.texts()) == ['{"prompt":"a","completion":"b"}']
        chat = opened(tmp_path, kind, records, format="messages", **options)
        assert [json.loads(text) for text in chat.texts()] == [{"messages": [USER, ASSISTANT]}]
        assert list(opened(tmp_path, kind, records, **options).texts()) == ["c"]

    def test_a_record_is_found_again(self, tmp_path, kind, streaming):
        source = opened(tmp_path, kind, PAIRS, streaming=streaming)
        expected = {
            "a.jsonl": f"{tmp_path}/a.jsonl:5",
            "a.jsonl.gz": f"{tmp_path}/a.jsonl.gz:5",
            "a.json": f"{tmp_path}/a.json, record 4",
            "a.parquet": f"{tmp_path}/a.parquet, row 4",
            "hub": "'x/y', row 4",
        }
        assert source.where(list(source.texts())[3]) == expected[kind]
        assert source.where("no such record") == "a record"

    def test_a_bad_record_is_named(self, tmp_path, kind, streaming):
        records = [*PAIRS[:3], {**PAIRS[3], "completion": " \n"}, PAIRS[4]]
        found = refused(opened, tmp_path, kind, records, streaming=streaming)
        place = {"hub": "'x/y', row 4", "a.json": "a.json, record 4", "a.parquet": "a.parquet, row 4"}
        where = "shard 0" if (kind, streaming) == ("hub", True) else place.get(kind, f"{kind}:5")
        assert re.match(rf"data.train\[0\].completion: column 'completion' of .*{where} is empty.*; complete or", found)


@pytest.mark.parametrize(
    "columns, expected",
    [
        (["text", "messages", "prompt", "completion"], "text"),
        (["messages", "prompt", "completion"], "messages"),
        (["prompt", "completion", "id"], "prompt_completion"),
    ],
)
def test_auto_takes_what_is_there(tmp_path, columns, expected):
    record = {"text": "a", "messages": [USER, ASSISTANT], "prompt": "b", "completion": "c", "id": 1}
    assert opened(tmp_path, "a.jsonl", [{key: record[key] for key in columns}]).format == expected


def test_auto_decides_once(tmp_path):
    """A later record of another format is a mistake, not a change of mind."""
    found = refused(opened, tmp_path, "a.jsonl", [*PAIRS, *CHATS])
    assert found.startswith(f"data.train[0].prompt: {tmp_path}/a.jsonl:7 has no column 'prompt'; it has messages")


def test_several_files_have_one_format(tmp_path):
    for name, records in (("a", []), ("b", CHATS), ("c", CHATS[:2])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    source = open_source(SourceSection(path=str(tmp_path)), FIELD)
    assert source.num_documents == 7
    assert source.where(list(source.texts())[1]) == f"{tmp_path}/b.jsonl:2"


def test_a_file_is_read_anew_for_other_columns(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"a": "1", "b": "2", "prompt": "", "text": "3", "messages": [USER, ASSISTANT]}))
    options = [
        {"format": "prompt_completion", "completion": "a"},
        {"format": "prompt_completion", "completion": "b"},
        {"format": "prompt_completion", "completion": "b", "prompt": "a"},
        {"format": "messages"},
        {"format": "text"},
        {"format": "text", "column": "a"},
    ]
    found = [list(open_source(SourceSection(path=str(file), **each), FIELD).texts()) for each in options]
    assert [list(json.loads(text).values()) for (text,) in found[:3]] == [["", "1"], ["", "2"], ["1", "2"]]
    assert json.loads(found[3][0]) == {"messages": [USER, ASSISTANT]}
    assert found[4:] == [["3"], ["1"]]


def test_other_columns_are_other_content(tmp_path):
    records = [{"a": str(i), "b": str(-i), "prompt": ""} for i in range(3)]
    options = {"format": "prompt_completion"}
    first, second = (opened(tmp_path, "a.jsonl", records, completion=name, **options).content for name in "ab")
    assert first != second


ONE, TWO = "column 'messages' of {file}:2 is not a chat: ", '; write it as {{"messages": [{{"role": "user"'
BAD = {
    "a number for a prompt": (
        {"prompt": 7, "completion": "a"},
        "prompt: column 'prompt' of {file}:2 holds int, not text: '7'; ",
    ),
    "no completion": (
        {"prompt": "a", "completion": None},
        "completion: column 'completion' of {file}:2 holds nothing, not",
    ),
    "an empty completion": (
        {"prompt": "a", "completion": ""},
        "completion: column 'completion' of {file}:2 is empty, so",
    ),
    "half a character": (
        {"prompt": "\ud83d", "completion": "a"},
        "path: {file}:2 holds half a surrogate pair, '\\ud83d', ",
    ),
    "half a character in a chat": (
        {"messages": [USER, {**ASSISTANT, "content": "\ud83d"}]},
        "path: {file}:2 holds half a surrogate pair, '\\ud83d', ",
    ),
    "a text for a chat": ({"messages": "Hello"}, f"messages: {ONE}it holds str{TWO}"),
    "an empty chat": ({"messages": []}, f"messages: {ONE}it is empty{TWO}"),
    "a chat of texts": ({"messages": ["Hello"]}, f"messages: {ONE}message 1 is str{TWO}"),
    "a message without a role": (
        {"messages": [{"content": "a"}]},
        f"messages: {ONE}the role of message 1 is nothing, not",
    ),
    "a message of parts": (
        {"messages": [USER, {"role": "assistant", "content": [{"type": "text"}]}]},
        f"messages: {ONE}the content of message 2 is list, not text{TWO}",
    ),
    "an empty answer": (
        {"messages": [USER, {"role": "assistant", "content": "\n"}]},
        f"messages: {ONE}message 2, the assistant's, is empty{TWO}",
    ),
    "no answer": ({"messages": [USER]}, f'messages: {ONE}no message has the role "assistant", so there is nothing to'),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("streaming", [False, True], ids=["indexed", "streamed"])
def test_bad_records(tmp_path, case, streaming):
    record, expected = BAD[case]
    found = refused(opened, tmp_path, "a.jsonl", [record], streaming=streaming)
    assert found.startswith(
        "data.train[0]." + expected.replace("{{", "{").replace("}}", "}").replace("{file}", f"{tmp_path}/a.jsonl")
    )
    assert "; " in found


class TestMissingColumns:
    def test_what_would_do_is_said(self, tmp_path):
        found = refused(opened, tmp_path, "a.jsonl", [{"instruction": "a", "output": "b"}])
        assert found == (
            f"data.train[0].column: {tmp_path}/a.jsonl:2 has no column 'text'; it has instruction, output; name the "
            "one with the text, or for examples have 'messages', or 'prompt' and 'completion'"
        )

    def test_a_misspelt_column(self, tmp_path):
        found = refused(
            opened, tmp_path, "a.parquet", [{"prompt": "a", "completions": "b"}], format="prompt_completion"
        )
        assert found == (
            f"data.train[0].completion: {tmp_path}/a.parquet has no column 'completion' (did you mean 'completions'?); "
            "it has prompt, completions"
        )

    def test_on_the_hub(self, tmp_path):
        found = refused(opened, tmp_path, "hub", [{"conversations": "a"}], format="messages")
        assert found == "data.train[0].messages: 'x/y' has no column 'messages'; it has conversations"


def test_text_holds_no_examples(tmp_path):
    (tmp_path / "a.txt").write_text("he was")
    found = refused(open_source, SourceSection(path=f"{tmp_path}/a.txt", format="messages"), FIELD)
    assert found.startswith(f"data.train[0].format is 'messages', but '{tmp_path}/a.txt' is text; examples are records")


def test_what_a_tokenizer_reads():
    assert plain_text("text", '{"prompt":') == '{"prompt":'
    assert plain_text("prompt_completion", '{"prompt":"a\\n","completion":"b"}') == "a\n\nb"
    assert plain_text("messages", json.dumps({"messages": [USER, ASSISTANT]})) == "größe?\n12 cm"
