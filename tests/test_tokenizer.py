from __future__ import annotations

import random
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer, GemmaTokenizer, PreTrainedTokenizerFast

from gemma_xla.data.files import find_files
from gemma_xla.data.tokenizer import check_tokenizer, document_encoder, load_tokenizer, train_tokenizer
from gemma_xla.errors import UserError
from gemma_xla.model.config import GemmaConfig

VOCAB_SIZE = 1000
# What tokenizers usually trip over.
SNIPPETS = [
    *(
        " ",
        "  ",
        " " * 40,
        "\n",
        "\n" * 40,
        "\t",
        "\r\n",
        "\x00",
        "=",
        "==",
        "#" * 17,
        "aaa",
        "self",
        ".",
        "123",
        "a b",
    ),
    *(
        "é",
        "e\u0301",
        "日本語",
        "🙂",
        "👩‍👩‍👧",
        "\u00a0",
        "\ufeff",
        "<b>",
        "</b",
        "<table>",
        "<0x41>",
        "<start_of_turn>",
    ),
]


@pytest.fixture(scope="module")
def library() -> list[str]:
    return [Path(file).read_text(encoding="utf-8") for file in find_files("{stdlib}/json/*.py", "data.train[0]")]


@pytest.fixture(scope="module")
def folder(library, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "trained"
    train_tokenizer(library, VOCAB_SIZE, folder, model_max_length=2048)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def reference(folder):
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def random_texts(count: int) -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices(SNIPPETS, k=draw.randrange(30))) for _ in range(count)]


def test_it_is_a_gemma_tokenizer(tokenizer, folder):
    assert isinstance(tokenizer, GemmaTokenizer)
    assert len(tokenizer) == VOCAB_SIZE
    assert tokenizer.model_max_length == 2048
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    assert {"tokenizer.model", "tokenizer.json", "tokenizer_config.json"} <= {file.name for file in folder.iterdir()}


def test_layout_of_ids(tokenizer, reference):
    layout = {
        **{0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 4: "<mask>", 5: "<2mass>", 6: "[@BOS@]"},
        # llama.cpp takes 67 to 70 for fill-in-the-middle and file separation, and 107 for the end of a turn.
        **{7: "<unused0>", 67: "<unused60>", 70: "<unused63>", 105: "<unused98>"},
        **{106: "<start_of_turn>", 107: "<end_of_turn>", 108: "\n", 138: "\n" * 31, 139: "▁▁", 168: "▁" * 31},
        **{169: "<table>", 176: "<td>", 177: "</table>", 184: "</td>", 185: "<h1>", 191: "<blockquote>"},
        **{192: "</h1>", 198: "</blockquote>", 199: "<strong>", 207: "<code>", 208: "</strong>", 216: "</code>"},
        **{217: "<0x00>", 472: "<0xFF>"},
    }
    for index, piece in layout.items():
        assert tokenizer.convert_ids_to_tokens(index) == reference.id_to_piece(index) == piece
    assert [reference.is_control(i) for i in range(5)] == [True, True, True, False, False]
    assert all(reference.is_byte(i) for i in range(217, 473))
    assert not reference.is_byte(473)


def test_ids_equal_those_of_sentencepiece_and_decode_to_the_text(tokenizer, reference, library):
    for text in [*library, *random_texts(500)]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == reference.encode(text)
        assert tokenizer.decode(ids) == reference.decode(ids) == text


def test_document_is_framed_and_never_cut(tokenizer, library):
    encode = document_encoder(tokenizer)
    # Another user of the tokenizer asks for truncation: documents stay whole.
    tokenizer("a b c d", truncation=True, max_length=2)
    text = "\n".join(library)
    tokens = encode(text).tolist()
    assert len(tokens) > 2 * tokenizer.model_max_length
    assert (tokens[0], tokens[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert tokenizer.decode(tokens[1:-1]) == text
    assert encode("").tolist() == [tokenizer.bos_token_id, tokenizer.eos_token_id]


def test_equal_texts_make_equal_files(folder, library, tmp_path):
    train_tokenizer(iter(library), VOCAB_SIZE, tmp_path / "again", model_max_length=2048)
    for file in folder.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_long_lines_are_learned_from(tmp_path):
    words = ["alpha", "beta", "gamma", "delta"]
    # Longer than SentencePiece's own limit, above which it would see no text at all.
    line = " ".join(random.Random(0).choices(words, k=5000))
    tokenizer = train_tokenizer([line], 495, tmp_path / "t")
    assert tokenizer.tokenize(" gamma") == ["▁gamma"]


def test_chat_template(tokenizer):
    messages = [
        {"role": "user", "content": " Hello\n"},
        {"role": "assistant", "content": "Hi there"},
        {"role": "user", "content": "Bye"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<bos><start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\nHi there<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n"
    )
    ids = tokenizer.apply_chat_template(messages)["input_ids"]
    assert ids[:3] == [2, 106, *tokenizer.encode("user", add_special_tokens=False)][:3]
    assert ids.count(2) == 1
    assert ids.count(106) == ids.count(107) == 3


@pytest.mark.parametrize("roles", [["system"], ["assistant"], ["user", "user"], ["user", "model"][::-1]])
def test_chat_template_rejects(tokenizer, roles):
    with pytest.raises(Exception, match="no system role|must alternate"):
        tokenizer.apply_chat_template([{"role": role, "content": "x"} for role in roles], tokenize=False)


class TestTrainingMistakes:
    def test_vocabulary_too_small(self, library, tmp_path):
        with pytest.raises(UserError, match=r"vocab_size is 474; 473 tokens are fixed .* at least (\d+)") as error:
            train_tokenizer(library, 474, tmp_path / "t")
        least = int(str(error.value).rsplit(" ", 1)[1])
        assert len(train_tokenizer(library, least, tmp_path / "t")) == least

    def test_vocabulary_too_large(self, tmp_path):
        with pytest.raises(UserError, match=r"vocab_size is 5000, .* at most (\d+)") as error:
            train_tokenizer(["to be or not to be"], 5000, tmp_path / "t")
        most = int(str(error.value).rsplit(" ", 1)[1])
        assert len(train_tokenizer(["to be or not to be"], most, tmp_path / "t")) == most

    def test_no_text(self, tmp_path):
        with pytest.raises(UserError, match="no text"):
            train_tokenizer([], 500, tmp_path / "t")

    def test_nothing_is_left_behind(self, library, tmp_path):
        with pytest.raises(UserError):
            train_tokenizer(library, 474, tmp_path / "t")
        assert list(tmp_path.iterdir()) == []

    def test_folder_in_use(self, library, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match="not empty"):
            train_tokenizer(library, VOCAB_SIZE, tmp_path)


class TestLoading:
    def test_missing(self, tmp_path):
        with pytest.raises(UserError, match=r"data.tokenizer: .*nothing"):
            load_tokenizer(tmp_path / "nothing")

    def test_without_special_tokens(self, tokenizer, tmp_path):
        bare = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer, bos_token="<bos>", eos_token="<eos>"
        )
        bare.save_pretrained(tmp_path)
        with pytest.raises(UserError, match="has no pad_token"):
            load_tokenizer(tmp_path)


class TestCheck:
    def test_fits(self, tokenizer):
        check_tokenizer(tokenizer, GemmaConfig(vocab_size=VOCAB_SIZE))

    def test_too_many_tokens(self, tokenizer):
        with pytest.raises(UserError, match=f"{VOCAB_SIZE} tokens .* vocab_size is 512"):
            check_tokenizer(tokenizer, GemmaConfig(vocab_size=512))

    def test_other_ids(self, tokenizer):
        with pytest.raises(UserError, match="eos_token_id is 1 but the model's is 107"):
            check_tokenizer(tokenizer, GemmaConfig(vocab_size=VOCAB_SIZE, eos_token_id=107))
