from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from gemma_xla.config_data import DataSection
from gemma_xla.data.chat import GEMMA_TEMPLATE, ChatError, Segment, segments, set_chat_template, write_chat_template
from gemma_xla.errors import UserError

TURNS = [
    {"role": "user", "content": " he was\n"},
    {"role": "assistant", "content": "in it"},
    {"role": "user", "content": "of?"},
    {"role": "assistant", "content": " for \n his \n"},
]
# What the published template of google/gemma-2b-it makes of these turns.
TEXT = (
    "<bos><start_of_turn>user\nhe was<end_of_turn>\n<start_of_turn>model\nin it<end_of_turn>\n"
    "<start_of_turn>user\nof?<end_of_turn>\n<start_of_turn>model\nfor \n his<end_of_turn>\n"
)
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def tokenizer(tokenizer_folder):
    return AutoTokenizer.from_pretrained(tokenizer_folder)


def data(template: object) -> DataSection:
    return DataSection(train="a.jsonl", chat_template=str(template))


def cut(tokenizer, messages: list[dict]) -> list[tuple[str, bool]]:
    found = [tuple(segment) for segment in segments(tokenizer, messages)]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert "".join(text for text, _ in found) == text
    return found


class TestSegments:
    def test_several_turns(self, tokenizer):
        tokenizer.chat_template = GEMMA_TEMPLATE
        assert cut(tokenizer, TURNS) == [
            ("<bos><start_of_turn>user\nhe was<end_of_turn>\n<start_of_turn>model\n", False),
            ("in it<end_of_turn>", True),
            ("\n<start_of_turn>user\nof?<end_of_turn>\n<start_of_turn>model\n", False),
            ("for \n his<end_of_turn>", True),
            ("\n", False),
        ]

    def test_a_chat_that_ends_with_a_question(self, tokenizer):
        tokenizer.chat_template = GEMMA_TEMPLATE
        assert cut(tokenizer, TURNS[:3])[1:] == [
            ("in it<end_of_turn>", True),
            ("\n<start_of_turn>user\nof?<end_of_turn>\n", False),
        ]

    def test_roles_in_any_order(self, tokenizer):
        tokenizer.chat_template = CHATML
        messages = [{"role": role, "content": role[0]} for role in ("assistant", "assistant", "system", "assistant")]
        assert cut(tokenizer, messages) == [
            ("<|assistant|>", False),
            ("a</s>", True),
            ("\n<|assistant|>", False),
            ("a</s>", True),
            ("\n<|system|>s</s>\n<|assistant|>", False),
            ("a</s>", True),
            ("\n", False),
        ]

    def test_a_template_that_refuses(self, tokenizer):
        tokenizer.chat_template = GEMMA_TEMPLATE
        with pytest.raises(ChatError, match="Gemma has no system role"):
            segments(tokenizer, [{"role": "system", "content": "a"}, TURNS[1]])

    @pytest.mark.parametrize(
        "template",
        [
            # Only the last answer is written in full, as templates of models that think do.
            "{% for m in messages %}{{ m.role }}{{ m.content if loop.last else '...' }}{% endfor %}"
            "{% if add_generation_prompt %}assistant{% endif %}",
            # What asks for an answer is not what stands before one.
            CHATML.replace("<|assistant|>{% endif", "<|model|>{% endif"),
        ],
    )
    def test_a_template_that_writes_turns_in_two_ways(self, tokenizer, template):
        tokenizer.chat_template = template
        with pytest.raises(ChatError, match="writes a turn in another way when it is the last"):
            segments(tokenizer, TURNS)

    def test_no_more_is_rendered_than_needed(self, tokenizer, monkeypatch):
        tokenizer.chat_template = GEMMA_TEMPLATE
        rendered, plain = [], type(tokenizer).apply_chat_template

        def spying(self, chats: list, **options) -> list[str]:
            rendered.extend(chats)
            return plain(self, chats, **options)

        monkeypatch.setattr(type(tokenizer), "apply_chat_template", spying)
        segments(tokenizer, TURNS * 5)
        assert len(rendered) == 2 * 10


class TestSetting:
    def test_gemma(self, tokenizer):
        tokenizer.chat_template = None
        set_chat_template(tokenizer, data("gemma"))
        assert tokenizer.apply_chat_template(TURNS, tokenize=False) == TEXT
        question = tokenizer.apply_chat_template(TURNS[:1], tokenize=False, add_generation_prompt=True)
        assert question == TEXT[: TEXT.index("in it")]

    def test_a_file(self, tokenizer, tmp_path):
        (tmp_path / "a.jinja").write_text(CHATML)
        set_chat_template(tokenizer, data(tmp_path / "a.jinja"))
        assert segments(tokenizer, TURNS)[1] == Segment("in it</s>", True)

    def test_none_leaves_the_tokenizers_own(self, tokenizer):
        tokenizer.chat_template = CHATML
        set_chat_template(tokenizer, DataSection(train="a.jsonl"))
        assert tokenizer.chat_template == CHATML

    def test_a_template_that_wants_other_chats_is_no_mistake(self, tokenizer, tmp_path):
        (tmp_path / "a.jinja").write_text("{{ raise_exception('no') }}")
        set_chat_template(tokenizer, data(tmp_path / "a.jinja"))

    @pytest.mark.parametrize(
        "content, expected",
        [
            (None, r"'.*/a\.jinja' cannot be read \(No such file or directory\); name a Jinja file, or 'gemma'"),
            (b"\xff", r"'.*/a\.jinja' cannot be read \(it is not UTF-8 text\); name"),
            (b"\n{% for m in %}", r".*/a\.jinja:2 is not a Jinja template: .*; correct it, or set"),
        ],
    )
    def test_mistakes(self, tokenizer, tmp_path, content, expected):
        if content is not None:
            (tmp_path / "a.jinja").write_bytes(content)
        with pytest.raises(UserError) as error:
            set_chat_template(tokenizer, data(tmp_path / "a.jinja"))
        assert re.match("data.chat_template: " + expected, str(error.value)), error.value
        assert "\n" not in str(error.value)


def test_what_is_written_is_read_by_others(tokenizer, tokenizer_folder, tmp_path):
    folder = Path(shutil.copytree(tokenizer_folder, tmp_path / "tokenizer"))
    tokenizer.chat_template = CHATML
    write_chat_template(tokenizer, folder)
    read = AutoTokenizer.from_pretrained(folder)
    assert read.chat_template == CHATML
    assert read.get_vocab() == tokenizer.get_vocab()
    # As programs do that know no chat_template.jinja.
    assert json.loads((folder / "tokenizer_config.json").read_text())["chat_template"] == CHATML
