"""From text to text: open a model with its tokenizer, and continue a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gemma_xla import hf
from gemma_xla.checkpoint import open_run
from gemma_xla.data.tokenizer import load_tokenizer
from gemma_xla.infer.generate import generate_steps
from gemma_xla.model.gemma import Gemma
from gemma_xla.storage import fetched, location


def open_model(name_or_path: str | Path) -> tuple[Gemma, Any]:
    """Return model and tokenizer of a run, a Hugging Face folder or a hub name, on the GPU if there is one.

    Raises:
        UserError: it is none of these.
    """
    folder = location(name_or_path)
    if (folder / "checkpoints").is_dir():
        reader, config, _ = open_run(folder)
        with torch.device("meta"):
            model = Gemma(config)
        for name in reader.names():
            path, _, leaf = name.rpartition(".")
            values = torch.empty(reader.shape(name))
            reader.copy_to(name, values)
            setattr(model.get_submodule(path), leaf, nn.Parameter(values))
        with fetched(folder / "tokenizer") as local:
            tokenizer = load_tokenizer(local)
    else:
        model = hf.load_model(name_or_path)
        tokenizer = load_tokenizer(name_or_path)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def stream(model: Gemma, tokenizer: Any, prompt: str, **options: Any) -> Iterator[str]:
    """Yield a prompt's continuation piece by piece.

    Args:
        options: those of `gemma_xla.infer.generate.generate_steps`.
    """
    ids = tokenizer(prompt)["input_ids"]
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
