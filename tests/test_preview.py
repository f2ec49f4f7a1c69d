from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from gemma_xla.cli import main
from gemma_xla.config_file import load_config
from gemma_xla.data.preview import preview, preview_html

PAIRS = [{"prompt": "it is ", "completion": f"{i}"} for i in range(4)]
CHAT = {"messages": [{"role": "user", "content": "he was?"}, {"role": "assistant", "content": "in\nit"}]}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def file(tmp_path, tokenizer_folder):
    """A config of pairs in their order; no model is there to open."""
    for name, records in (("pairs", PAIRS), ("chat", [CHAT]), ("text", [{"text": "he was \033[5m"}])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    tree = {
        "output_dir": f"{tmp_path}/run",
        "data": {
            "train": f"{tmp_path}/pairs.jsonl",
            "tokenizer": str(tokenizer_folder),
            "shuffle": False,
            "eval_fraction": 0.0,
            "seq_len": 64,
        },
        "train": {"steps": 1, "batch_size": 1},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "run.yaml"


def shown(file, *overrides: str, out: io.StringIO | None = None, count: int = 1) -> str:
    out = out or io.StringIO()
    preview(load_config(str(file), list(overrides)), count, out)
    return out.getvalue()


def test_pairs(file):
    assert shown(file, count=2) == (
        "data.train[0] document 0: 8 tokens, 2 of them trained\n<bos>it is 【0<eos>】\n\n"
        "data.train[0] document 1: 8 tokens, 2 of them trained\n<bos>it is 【1<eos>】\n"
    )


def test_a_chat(file, tmp_path):
    text = shown(file, f"data.train={tmp_path}/chat.jsonl")
    assert text.split("\n", 1)[1] == (
        "<bos><start_of_turn>user\nhe was?<end_of_turn>\n<start_of_turn>model\n【in\nit<end_of_turn>】\n\n"
    )


def test_on_a_terminal(file, tmp_path, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert shown(file, out=Terminal()).endswith("\n\033[2m<bos>it is \033[0m\033[32m0<eos>\033[0m\n")
    # What text says to the terminal is not passed on.
    assert "\033[5m" not in shown(file, f"data.train={tmp_path}/text.jsonl", out=Terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in shown(file, out=Terminal())


def test_as_html(file, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "it\n", "completion": "<b>&"}) + "\n")
    html = preview_html(load_config(str(file)), 1)
    head, boxes = html.split("\n", 1)
    found = re.findall(r'<(b|span) title="(\d+)" style="([^"]*)">(.*?)</(?:b|span)>', boxes, re.DOTALL)
    assert head.endswith(f"data.train[0] document 0: {len(found)} tokens, 3 of them trained")
    read = [text for tag, _, _, text in found if tag == "span"]
    learnt = [text for tag, _, _, text in found if tag == "b"]
    # The text's own tags and line breaks are shown.
    assert "".join(read) == "&lt;bos&gt;it↵\n" and "".join(learnt) == "&lt;b&gt;&amp;&lt;eos&gt;"
    assert found[0][1] == "2" and found[-1][1] == "1"
    styles = {tag: style for tag, _, style, _ in found}
    assert len(set(styles.values())) == 2 and all("color:black" in style for style in styles.values())


def test_too_long(file):
    assert shown(file, "data.seq_len=6").endswith("<bos>it is 【0】\n")


def test_a_template_of_its_own(file, tmp_path):
    (tmp_path / "a.jinja").write_text(
        "{% for m in messages %}{{ m.role }}:{{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    text = shown(file, f"data.train={tmp_path}/chat.jsonl", f"data.chat_template={tmp_path}/a.jinja")
    assert text.endswith("\n<bos>user:he was? assistant:【in\nit】 \n")


@pytest.mark.parametrize("where", ["init_from a model", "init_from a run", "the run itself"])
def test_the_tokenizer_is_found(file, tmp_path, tokenizer_folder, where):
    expected = shown(file)
    folder = tmp_path / {"init_from a model": "model", "init_from a run": "other/tokenizer"}.get(where, "run/tokenizer")
    shutil.copytree(tokenizer_folder, folder)
    init = {"init_from a model": "model", "init_from a run": "other"}.get(where)
    named = f"model={{init_from: '{tmp_path}/{init}'}}" if init else "data.vocab_size=500"
    assert shown(file, "data.tokenizer=null", named) == expected


class TestCommand:
    def test_it_needs_no_devices(self, file):
        code = (
            "import sys\nfrom gemma_xla.cli import main\n"
            f"main(['preview', {str(file)!r}, '--set', 'data.shuffle=true', '-n', '4'])\n"
            "assert not {'torch_xla', 'accelerate'} & sys.modules.keys(), 'devices'"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert sorted(done.stdout.split("【")[i][0] for i in range(1, 5)) == ["0", "1", "2", "3"]

    @pytest.mark.parametrize(
        "override, expected",
        [
            ("data.tokenizer=null", "data.tokenizer is missing: a run trains a tokenizer first, and there is none in"),
            ("data.train={tmp_path}/none.jsonl", "data.train[0].path: there is no file or folder"),
            ("data.tokenizer=" + "a" * 300, "data.tokenizer: 'aaa"),
            ("data.chat_template={tmp_path}/none.jinja", "data.chat_template: '{tmp_path}/none.jinja' cannot be read"),
            ("data.trains=a", "unknown key 'data.trains'"),
        ],
    )
    def test_mistakes(self, file, tmp_path, capsys, override, expected):
        with pytest.raises(SystemExit) as stop:
            main(["preview", str(file), "--set", override.replace("{tmp_path}", str(tmp_path))])
        said = capsys.readouterr()
        assert stop.value.code == 2
        assert expected.replace("{tmp_path}", str(tmp_path)) in said.err
        assert said.err.count("\n") == 1
        assert said.out == ""
