"""Examples as tokens, compared to what is put together by hand and to what transformers makes of them."""

from __future__ import annotations

import json
import re

import datasets
import pytest
from transformers import AutoTokenizer

from gemma_xla.config_data import DataSection
from gemma_xla.data.chat import GEMMA_TEMPLATE
from gemma_xla.data.documents import Corpus
from gemma_xla.data.examples import ExampleEncoder, source_encoder
from gemma_xla.data.loader import TrainLoader
from gemma_xla.data.sources import IndexedSource
from gemma_xla.errors import UserError
from tests.test_chat import CHATML, TURNS

BOS, EOS, START, END = 2, 1, 106, 107
# The published template, with marks around what the assistant says.
MARKED = GEMMA_TEMPLATE.replace(
    '{{- "<start_of_turn>" + role + "\\n" + message.content | trim + "<end_of_turn>\\n" -}}',
    '{{- "<start_of_turn>" + role + "\\n" -}}{%- if role == "model" -%}{%- generation -%}'
    '{{- message.content | trim + "<end_of_turn>\\n" -}}{%- endgeneration -%}{%- else -%}'
    '{{- message.content | trim + "<end_of_turn>\\n" -}}{%- endif -%}',
)


@pytest.fixture
def tokenizer(tokenizer_folder):
    return AutoTokenizer.from_pretrained(tokenizer_folder)


def source(format: str) -> IndexedSource:
    texts = datasets.Dataset.from_dict({"text": []})
    return IndexedSource("data.train[0]", 1.0, texts, "text", format, lambda record: "a.jsonl:7")


def encoder(tokenizer, format: str, **options) -> ExampleEncoder:
    return source_encoder(tokenizer, source(format), DataSection(train="a.jsonl", **options))


def chat(tokenizer, messages: list[dict], **options) -> tuple[list[int], list[bool]]:
    example = encoder(tokenizer, "messages", **options)(json.dumps({"messages": messages}))
    return example.tokens.tolist(), example.trained.tolist()


def pair(tokenizer, prompt: str, completion: str, **options) -> tuple[list[int], list[bool]]:
    record = json.dumps({"prompt": prompt, "completion": completion})
    example = encoder(tokenizer, "prompt_completion", **options)(record)
    return example.tokens.tolist(), example.trained.tolist()


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def joined(*parts: tuple[list[int], bool]) -> tuple[list[int], list[bool]]:
    return [token for tokens, _ in parts for token in tokens], [trained for tokens, trained in parts for _ in tokens]


class TestPromptCompletion:
    def test_by_hand(self, tokenizer):
        characters = tokenizer.convert_tokens_to_ids
        # "z" is not in the vocabulary: its byte is.
        tokens, trained = pair(tokenizer, "z", "zz")
        byte = characters("<0x7A>")
        assert tokens == [BOS, byte, byte, byte, EOS]
        assert trained == [False, False, True, True, True]

    @pytest.mark.parametrize(
        "prompt, completion", [("he was ", "in it"), ("", "he"), ("he was", " in\n"), ("he", "he")]
    )
    def test_each_is_tokenized_by_itself(self, tokenizer, prompt, completion):
        expected = joined(([BOS], False), (ids(tokenizer, prompt), False), ([*ids(tokenizer, completion), EOS], True))
        assert pair(tokenizer, prompt, completion) == expected

    def test_a_model_that_is_asked_gets_the_tokens_it_has_seen(self, tokenizer):
        # Together they would share a token.
        assert len(ids(tokenizer, "at")) == 1
        tokens, trained = pair(tokenizer, "it is a", "t")
        assert tokens[: trained.index(True)] == tokenizer("it is a")["input_ids"]


class TestMessages:
    def test_by_hand(self, tokenizer):
        newline = tokenizer.convert_tokens_to_ids("\n")
        user, model, he, it = (ids(tokenizer, text) for text in ("user", "model", "he was", "it"))
        assert chat(
            tokenizer, [{"role": "user", "content": "he was"}, {"role": "assistant", "content": "it"}]
        ) == joined(
            ([BOS, START, *user, newline, *he, END, newline, START, *model, newline], False),
            ([*it, END], True),
            ([newline], False),
        )

    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_the_tokens_and_marks_of_transformers(self, tokenizer, count):
        messages = (TURNS * 2)[: 2 * count]
        theirs = tokenizer.apply_chat_template(
            messages, chat_template=MARKED, return_assistant_tokens_mask=True, return_dict=True
        )
        tokens, trained = chat(tokenizer, messages)
        assert tokens == theirs["input_ids"] == tokenizer.apply_chat_template(messages)["input_ids"]
        newline = tokenizer.convert_tokens_to_ids("\n")
        # There, the new line after an answer is marked, too.
        after = [
            trained and token == newline and before == END
            for before, token, trained in zip([0, *tokens], tokens, theirs["assistant_masks"], strict=False)
        ]
        assert sum(after) == count
        assert trained == [
            bool(marked) and not ends for marked, ends in zip(theirs["assistant_masks"], after, strict=True)
        ]

    def test_a_model_that_is_asked_gets_the_tokens_it_has_seen(self, tokenizer):
        tokens, trained = chat(tokenizer, TURNS)
        asked = tokenizer.apply_chat_template(TURNS[:3], add_generation_prompt=True)["input_ids"]
        assert tokens[: len(asked)] == asked
        assert trained[len(asked) - 1 : len(asked) + 1] == [False, True]

    def test_there_is_one_bos(self, tokenizer):
        assert chat(tokenizer, TURNS)[0].count(BOS) == 1
        tokenizer.chat_template = CHATML
        tokens, trained = chat(tokenizer, TURNS)
        assert tokens == [BOS, *ids(tokenizer, tokenizer.apply_chat_template(TURNS, tokenize=False))]
        assert len(trained) == len(tokens)


class TestTooLong:
    def test_truncated_after_as_many_pairs_as_a_row_has(self, tokenizer):
        tokens, trained = pair(tokenizer, "he was ", "in it for his boat")
        assert len(tokens) > 9
        assert pair(tokenizer, "he was ", "in it for his boat", seq_len=8) == (tokens[:9], trained[:9])
        exact = len(tokens) - 1
        assert pair(tokenizer, "he was ", "in it for his boat", seq_len=exact) == (tokens, trained)

    def test_dropped(self, tokenizer):
        options = {"too_long": "drop", "seq_len": 8}
        assert pair(tokenizer, "he was ", "in it for his boat", **options) == ([BOS], [False])
        assert len(pair(tokenizer, "", "he", **options)[0]) > 2

    def test_nothing_left_to_learn(self, tokenizer):
        before = 1 + len(ids(tokenizer, "he was in it "))
        with pytest.raises(UserError) as error:
            pair(tokenizer, "he was in it ", "he", seq_len=before - 1)
        assert str(error.value) == (
            "data.train[0]: of a.jsonl:7 nothing is left to learn: what comes before it takes "
            f"{before} tokens, and data.seq_len is {before - 1}; raise data.seq_len, or set data.too_long=drop"
        )
        assert sum(pair(tokenizer, "he was in it ", "he", seq_len=before)[1]) == 1


class TestMistakes:
    def test_no_template(self, tokenizer):
        tokenizer.chat_template = None
        with pytest.raises(
            UserError, match=r"^data.train\[0\]: it holds chats, but .* set data.chat_template=gemma or"
        ):
            encoder(tokenizer, "messages")
        encoder(tokenizer, "prompt_completion")

    def test_a_chat_that_is_refused(self, tokenizer):
        with pytest.raises(UserError) as error:
            chat(tokenizer, [{"role": "system", "content": "a"}, TURNS[1]])
        assert re.match(
            r"data.train\[0\]: the chat template cannot be used for a.jsonl:7: Gemma has no system role: .*; correct",
            str(error.value),
        )

    def test_a_template_that_leaves_the_answer_out(self, tokenizer):
        tokenizer.chat_template = "{{ messages[0].content }}"
        with pytest.raises(UserError, match="writes nothing to learn for a.jsonl:7; correct"):
            chat(tokenizer, TURNS[:2])

    @pytest.mark.parametrize("streaming", [False, True])
    def test_the_file_and_line_are_found_while_training(self, tokenizer, tmp_path, streaming):
        records = [{"messages": TURNS[:2]}] * 3 + [{"messages": [TURNS[0], TURNS[0], TURNS[1]]}]
        (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, records)))
        config = DataSection(train=[{"path": f"{tmp_path}/a.jsonl", "streaming": streaming}], eval_fraction=0.0)
        with (
            TrainLoader(Corpus(config, seed=0), tokenizer, num_rows=1, rows=range(1)) as loader,
            pytest.raises(UserError, match=rf"cannot be used for {tmp_path}/a.jsonl:7: messages must alternate"),
        ):
            list(loader)
