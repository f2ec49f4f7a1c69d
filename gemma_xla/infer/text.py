"""From text to text: open a model with its tokenizer, and continue a prompt."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gemma_xla import hf
from gemma_xla.data.chat import prompt_tokens
from gemma_xla.data.tokenizer import load_tokenizer
from gemma_xla.infer.generate import generate_steps
from gemma_xla.model.gemma import Gemma
from gemma_xla.storage import is_local
from gemma_xla.weights import open_weights


class Opened(NamedTuple):
    """A model, its tokenizer, and the tokens that end its answers."""

    model: Gemma
    tokenizer: Any
    end_tokens: list[int]


def open_model(name_or_path: str | Path) -> Opened:
    """Open a run, an adapter, a Hugging Face folder or a hub name, on the GPU if there is one.

    Raises:
        UserError: it is none of these.
    """
    weights = open_weights(name_or_path)
    model = hf.model_from(weights.reader, weights.config, weights.description)
    ends = list(weights.end_tokens) or [weights.config.eos_token_id]
    return Opened(model.to("cuda" if torch.cuda.is_available() else "cpu"), _tokenizer(weights.tokenizer), ends)


def _tokenizer(folder: Path) -> Any:
    if is_local(folder):
        return load_tokenizer(folder)
    with tempfile.TemporaryDirectory() as parent:
        hf.copy_tokenizer(folder, Path(parent) / "tokenizer")
        return load_tokenizer(Path(parent) / "tokenizer")


def stream(model: Gemma, tokenizer: Any, prompt: str, *, chat: bool = False, **options: Any) -> Iterator[str]:
    """Yield a prompt's continuation piece by piece.

    Args:
        chat: write the prompt as a user's turn, with the tokenizer's chat template.
        options: those of `gemma_xla.infer.generate.generate_steps`.
    """
    ids = prompt_tokens(tokenizer, prompt, chat)
    done, text = len(ids), ""
    for (token,) in generate_steps(model, [ids], **options):
        if token is None:
            break
        ids.append(token)
        # A token may hold half a character, and how a token reads depends on those before it: decode all of them.
        now = tokenizer.decode(ids[done:], skip_special_tokens=True)
        if not now.endswith("\ufffd"):
            yield now[len(text) :]
            text = now
    yield tokenizer.decode(ids[done:], skip_special_tokens=True)[len(text) :]
