"""Tokenizers with Gemma's layout of ids: training one, loading one, and turning documents into tokens."""

from __future__ import annotations

import copy
import io
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from tokenizers import Tokenizer
from transformers import AddedToken, AutoTokenizer, GemmaTokenizer, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import SentencePieceExtractor

from gemma_xla.data.chat import GEMMA_TEMPLATE
from gemma_xla.errors import UserError
from gemma_xla.model.config import GemmaConfig

# Documents are encoded one at a time in a background thread; more threads would only take cores from the step.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_HTML = (
    ["table", "caption", "thead", "tbody", "tfoot", "tr", "th", "td"],
    ["h1", "h2", "h3", "h4", "h5", "h6", "blockquote"],
    ["strong", "em", "b", "i", "u", "s", "sub", "sup", "code"],
)
_TURNS = ("<start_of_turn>", "<end_of_turn>")
# Ids 4 to 216; 0 to 3 are <pad>, <eos>, <bos> and <unk>, 217 to 472 the bytes, and learned pieces follow.
_SYMBOLS = [
    *("<mask>", "<2mass>", "[@BOS@]"),
    *(f"<unused{i}>" for i in range(99)),
    *_TURNS,
    *("\n" * n for n in range(1, 32)),
    *("▁" * n for n in range(2, 32)),
    *(mark.format(tag) for tags in _HTML for mark in ("<{}>", "</{}>") for tag in tags),
]
_FIRST_LEARNED = 4 + len(_SYMBOLS) + 256
# Enough for small vocabularies, and it bounds the training time to seconds.
_MAX_CHARACTERS = 20_000_000
# SentencePiece skips longer lines (its limit is 4192 bytes).
_MAX_LINE = 1000


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, folder: str | Path, *, model_max_length: int = 8192
) -> PreTrainedTokenizerBase:
    """Train a byte-fallback BPE tokenizer with Gemma's special tokens and save it, as a whole or not at all.

    At most the first 20 million characters of ``texts`` are used, so give them in random order. Equal texts make
    equal files. Text comes back from its tokens unchanged, except that "▁" (U+2581) stands for the space.

    Raises:
        UserError: ``folder`` already holds something, or the text does not fit ``vocab_size`` tokens.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"tokenizer: {folder} is not empty; remove it or choose another folder")
    model = _train_bpe(texts, vocab_size)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as parent:
        temporary = Path(parent) / folder.name
        temporary.mkdir()
        (temporary / "tokenizer.model").write_bytes(model)
        tokenizer = _convert(temporary / "tokenizer.model", model_max_length)
        # The template goes into tokenizer_config.json, where every reader looks.
        tokenizer.save_pretrained(temporary, save_jinja_files=False)
        _add_for_other_readers(temporary)
        temporary.replace(folder)
    return load_tokenizer(folder)


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder or hub name.

    Raises:
        UserError: there is none, it cannot be read, it is not a fast tokenizer, it has no vocabulary, or no token that
            starts, ends or pads a text.
    """
    name, folder = str(name_or_path), Path(name_or_path).expanduser()
    try:
        is_folder = folder.is_dir()
    except OSError as error:
        raise UserError(f"data.tokenizer: {name!r} cannot be read ({error.strerror}); check the path") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder if is_folder else name)
        ids = tokenizer("text", add_special_tokens=False)["input_ids"]
    except Exception as error:  # the tokenizers library raises nothing more special
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if is_folder:
            message = f"the tokenizer in {name!r} cannot be read: {_broken_json(folder)}{reason}; copy the folder anew"
        else:
            message = (
                f"{name!r} is neither a folder with a tokenizer nor the name of one on the hub that could be read: "
                f"{reason}; check the name and the connection"
            )
        raise UserError(f"data.tokenizer: {message}") from error
    if not tokenizer.is_fast:
        raise UserError(f"data.tokenizer: {name!r} has no fast tokenizer (tokenizer.json); use one of the Gemma family")
    for token in ("bos_token", "eos_token", "pad_token"):
        if getattr(tokenizer, token) is None:
            raise UserError(f"data.tokenizer: {name!r} has no {token}; use a tokenizer of the Gemma family")
    # Without a vocabulary, transformers makes up a tokenizer of special tokens alone.
    if set(ids) <= set(tokenizer.all_special_ids):
        raise UserError(f"data.tokenizer: {name!r} has no vocabulary; it needs tokenizer.json or tokenizer.model")
    return tokenizer


def _broken_json(folder: Path) -> str:
    """Name the folder's first file that is not JSON, if there is one, to begin a message with."""
    for file in sorted(folder.glob("*.json")):
        try:
            json.loads(file.read_bytes())
        except ValueError:
            return f"{file.name}: "
    return ""


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: GemmaConfig) -> None:
    """Make sure that the model can read and end what the tokenizer writes.

    Raises:
        UserError: there are more tokens than the model has embeddings, or a special token has another id.
    """
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"data.tokenizer: it has {len(tokenizer)} tokens but the model's vocab_size is {config.vocab_size}; "
            f"set model.overrides.vocab_size={len(tokenizer)} or use another tokenizer"
        )
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        ours, theirs = getattr(tokenizer, name), getattr(config, name)
        if ours != theirs:
            raise UserError(
                f"data.tokenizer: its {name} is {ours} but the model's is {theirs}; "
                f"set model.overrides.{name}={ours} or use another tokenizer"
            )


def text_encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[str]], list[list[int]]]:
    """Return a function from texts to the tokens of each; none are added, and those named in a text are found."""
    backend = _untouched(tokenizer)
    # The batch call lets other Python threads run meanwhile; the single one does not.
    return lambda texts: [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def document_encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], np.ndarray]:
    """Return a function from a text to its tokens: bos, text, eos; ``[tokens]`` of int32."""
    encode_all = text_encoder(tokenizer)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id

    def encode(text: str) -> np.ndarray:
        (ids,) = encode_all([text])
        return np.array([bos, *ids, eos], dtype=np.int32)

    return encode


@lru_cache(maxsize=1)  # for a large vocabulary it takes a second, and every source needs one
def _untouched(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    # A copy: calls of the tokenizer elsewhere switch its truncation and padding on and off.
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()
    backend.no_padding()
    return backend


def _train_bpe(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train with the settings of Gemma's own tokenizer; return the serialized SentencePiece model."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            user_defined_symbols=_SYMBOLS,
            **{f"{name}_id": i for i, name in enumerate(("pad", "eos", "bos", "unk"))},
            **{f"{name}_piece": f"<{name}>" for name in ("pad", "eos", "bos", "unk")},
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            # The number of threads is written into the model: fixed, so that equal texts make equal files.
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _explain(str(error), vocab_size) from error
    return model.getvalue()


def _lines(texts: Iterable[str]) -> Iterator[str]:
    room = _MAX_CHARACTERS
    for text in texts:
        for line in text[:room].split("\n"):
            for start in range(0, len(line), _MAX_LINE):
                yield line[start : start + _MAX_LINE]
        room -= len(text)
        if room <= 0:
            return


def _explain(message: str, vocab_size: int) -> Exception:
    """What SentencePiece's complaint means."""
    if most := re.search(r"too high .*<= (\d+)", message):
        return UserError(
            f"data.vocab_size is {vocab_size}, more than the training text supports; set it to at most {most[1]}"
        )
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return UserError(
            f"data.vocab_size is {vocab_size}; {_FIRST_LEARNED} tokens are fixed and this text's characters need "
            f"more, so set it to at least {least[1]}"
        )
    if "!sentences_.empty()" in message:
        return UserError("data.train: there is no text to train a tokenizer on")
    return RuntimeError(message)


def _convert(model: Path, model_max_length: int) -> GemmaTokenizer:
    """Return the Hugging Face tokenizer that encodes as the SentencePiece model does."""
    extractor = SentencePieceExtractor(str(model))
    parts = extractor.extract(GemmaTokenizer.model)
    return GemmaTokenizer(
        vocab=parts["vocab"],
        merges=parts["merges"],
        added_tokens_decoder=dict(_added_tokens(extractor.proto)),
        add_bos_token=True,
        model_max_length=model_max_length,
        chat_template=GEMMA_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _added_tokens(proto: Any) -> Iterator[tuple[int, AddedToken]]:
    """Special and user-defined pieces, which are found in a text before its words are."""
    user_defined = proto.SentencePiece.USER_DEFINED
    learned = {proto.SentencePiece.NORMAL, proto.SentencePiece.BYTE}
    for index, piece in enumerate(proto.pieces):
        if piece.type not in learned:
            special = piece.type != user_defined or piece.piece in _TURNS
            # Runs of "▁" are runs of spaces, which only turn into "▁" when the text is normalized.
            yield index, AddedToken(piece.piece, normalized=piece.piece.startswith("▁"), special=special)


def _add_for_other_readers(folder: Path) -> None:
    """Rewrite the saved files so that `transformers` before 4.45 and llama.cpp's converter read them as we do.

    The former know merges as "a b" (newer ones read both), the latter takes the kind of each special and user-defined
    token from tokenizer_config.json.
    """
    backend_path, config_path = folder / "tokenizer.json", folder / "tokenizer_config.json"
    backend, config = (json.loads(path.read_text(encoding="utf-8")) for path in (backend_path, config_path))
    # No piece holds a space.
    backend["model"]["merges"] = [" ".join(merge) for merge in backend["model"]["merges"]]
    config["added_tokens_decoder"] = {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"}
        for token in backend["added_tokens"]
    }
    for path, value in ((backend_path, backend), (config_path, config)):
        path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
