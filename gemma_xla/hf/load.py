"""A Gemma from a Hugging Face folder or hub id, or from anything that has its tensors."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

from gemma_xla.errors import UserError
from gemma_xla.hf.config import read_config
from gemma_xla.hf.folder import ADAPTER, TOKENIZER_FILES, tokenizer_files
from gemma_xla.hf.reader import INDEX, HfReader, TensorReader, check_tensors
from gemma_xla.model.config import GemmaConfig
from gemma_xla.model.gemma import Gemma
from gemma_xla.storage import location, reason

_WANTED = [
    *("model*.safetensors", INDEX, "config.json", "generation_config.json"),
    *(ADAPTER.config, "adapter_model.safetensors"),
    *TOKENIZER_FILES,
]


def resolve(name_or_path: str | Path, weights: bool = True) -> Path:
    """Return a folder, local or a URL, as it is; fetch a Hugging Face model id, or take it from the cache when offline.

    Args:
        weights: whether more of it is needed than its config.

    Raises:
        UserError: there is no such folder, or the model cannot be fetched.
    """
    return _resolve(name_or_path, _WANTED if weights else ["config.json"])


def copy_tokenizer(name_or_path: str | Path, out: Path) -> None:
    """Copy the tokenizer of a folder or hub id into the new local folder ``out``.

    Raises:
        UserError: there is no such folder or id, or it has no tokenizer.
    """
    files = tokenizer_files(_resolve(name_or_path, list(TOKENIZER_FILES)))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as parent:
        partial = Path(parent) / out.name
        partial.mkdir()
        for file in files:
            (partial / file.name).write_bytes(file.read_bytes())
        partial.rename(out)


def _resolve(name_or_path: str | Path, wanted: list[str]) -> Path:
    folder, name = location(name_or_path), str(name_or_path)
    try:
        if folder.is_dir():
            return folder
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({reason(error)}); check the path") from error
    if "://" in name:
        raise UserError(f"{name}: no such folder; check the name")
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # noqa: BLE001 (beside its own errors, those of whatever HTTP client it uses)
        raise UserError(f"{name}: no such folder, and {_why_not(name, error)}") from error


def _why_not(name: str, error: Exception) -> str:
    """Why the hub did not give a model, and the way out."""
    if isinstance(error, HFValidationError):
        return "it is not the name of a model on the Hugging Face hub, such as google/gemma-2b; check the name"
    if isinstance(error, GatedRepoError):
        return f"the model is gated; accept its terms on https://huggingface.co/{name} and run `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "the Hugging Face hub shows no such model; check the name and, for a private model, run `hf auth login`"
    why = reason(error.__cause__ or error)
    return f"not to be had from the Hugging Face hub or its local cache ({why}); check the name and the connection"


def load_model(name_or_path: str | Path, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> Gemma:
    """Load a Gemma from a folder or hub id onto the CPU; nothing of a tensor's size is in memory beside the model.

    Raises:
        UserError: it is not a Gemma, or its tensors do not fit its config.
    """
    folder = resolve(name_or_path)
    return model_from(HfReader(folder), read_config(folder), str(folder), dtype, attention)


def model_from(
    reader: TensorReader,
    config: GemmaConfig,
    origin: str,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
) -> Gemma:
    """Build a Gemma on the CPU from a reader's tensors, one after the other.

    Args:
        origin: what to call the reader's tensors in messages.

    Raises:
        UserError: they do not fit the config.
    """
    names = check_tensors(reader, config, origin)
    with torch.device("meta"):
        model = Gemma(config, attention).to(dtype)
    model.to_empty(device="cpu")
    for name in names:
        reader.copy_to(name, model.get_parameter(name))
    return model
