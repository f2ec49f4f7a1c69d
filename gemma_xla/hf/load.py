"""A Gemma from a Hugging Face folder or hub id."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from gemma_xla.errors import UserError
from gemma_xla.hf.config import read_config
from gemma_xla.hf.reader import INDEX, HfReader, check_tensors
from gemma_xla.hf.writer import TOKENIZER_FILES, tokenizer_files
from gemma_xla.model.gemma import Gemma

_WANTED = ["model*.safetensors", INDEX, "config.json", "generation_config.json", *TOKENIZER_FILES]


def resolve(name_or_path: str | Path) -> Path:
    """Return a local folder as it is; fetch a Hugging Face model id, or take it from the cache when offline.

    Raises:
        UserError: there is no such folder, or the model cannot be fetched.
    """
    return _resolve(name_or_path, _WANTED)


def copy_tokenizer(name_or_path: str | Path, out: Path) -> None:
    """Copy the tokenizer of a folder or hub id into the new folder ``out``.

    Raises:
        UserError: there is no such folder or id, or it has no tokenizer.
    """
    files = tokenizer_files(_resolve(name_or_path, list(TOKENIZER_FILES)))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as parent:
        partial = Path(parent) / out.name
        partial.mkdir()
        for file in files:
            shutil.copyfile(file, partial / file.name)
        partial.rename(out)


def _resolve(name_or_path: str | Path, wanted: list[str]) -> Path:
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(str(name_or_path), allow_patterns=wanted))
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{name_or_path}: no such folder, and not to be had from the Hugging Face hub ({reason}); check the name "
            "and, for a gated model such as Gemma, accept its terms on huggingface.co and run `hf auth login`"
        ) from error


def load_model(name_or_path: str | Path, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> Gemma:
    """Load a Gemma from a folder or hub id onto the CPU.

    Raises:
        UserError: it is not a Gemma, or its tensors do not fit its config.
    """
    folder = resolve(name_or_path)
    config = read_config(folder)
    reader = HfReader(folder)
    names = check_tensors(reader, config, str(folder))
    with torch.device("meta"):
        model = Gemma(config, attention)
    model.load_state_dict({name: reader.read(name).to(dtype) for name in names}, assign=True)
    return model
