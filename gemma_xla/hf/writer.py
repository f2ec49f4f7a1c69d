"""Writes a Hugging Face model folder, a shard at a time."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from tqdm import tqdm

from gemma_xla.errors import UserError, nearest
from gemma_xla.hf.config import config_json, generation_config_json
from gemma_xla.hf.reader import INDEX, TensorReader, check_tensors
from gemma_xla.model.config import GemmaConfig

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def export(
    reader: TensorReader,
    config: GemmaConfig,
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    dtype: str = "bfloat16",
    max_shard_size: str = "5GB",
    card: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a model folder that transformers and the programs around it load; return its path.

    The folder appears whole or not at all: until it is done it is written beside ``out`` under another name. One shard
    is in memory at a time.

    Args:
        tokenizer: the folder whose tokenizer files are copied.
        dtype: what weights are stored as: float32, bfloat16 or float16.
        max_shard_size: the largest weight file, such as "5GB".
        card: the text of ``README.md``.
        overwrite: replace the model folder that is already there.

    Raises:
        UserError: an argument is impossible, ``out`` is taken, or the tensors do not fit the config.
    """
    out = Path(out).expanduser().absolute()
    if dtype not in _DTYPES:
        raise UserError(f"dtype is {dtype!r}; it must be one of {', '.join(_DTYPES)}{nearest(dtype, _DTYPES)}")
    limit = _parse_size(max_shard_size)
    texts = {"config.json": _dump(config_json(config, dtype))}
    texts["generation_config.json"] = _dump(generation_config_json(config))
    if card is not None:
        texts["README.md"] = card
    copies = tokenizer_files(Path(tokenizer).expanduser()) if tokenizer is not None else []
    _check_free(out, overwrite)
    names = check_tensors(reader, config, f"export to {out}")

    partial = _sibling(out, "partial")
    try:
        _make(partial)
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")
        for path in copies:
            shutil.copyfile(path, partial / path.name)
        _write_weights(reader, names, partial, _DTYPES[dtype], limit)
        _put_in_place(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _write_weights(reader: TensorReader, names: list[str], folder: Path, dtype: torch.dtype, limit: int) -> None:
    plan = split_state_dict_into_shards_factory(
        {name: reader.shape(name) for name in names},
        get_storage_size=lambda shape: math.prod(shape) * dtype.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    # disable=None: no bar when the output is not a terminal.
    for file, held in tqdm(
        plan.filename_to_tensors.items(), "export", unit="shard", disable=None if plan.is_sharded else True
    ):
        tensors = {name: reader.read(name).to(dtype).contiguous() for name in held}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        # safetensors makes files that only their owner may read.
        shutil.copymode(folder / "config.json", folder / file)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(_dump(index), encoding="utf-8")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder.parent}: {error.strerror or error}; export to a folder you may write to") from error


def _put_in_place(partial: Path, out: Path) -> None:
    if not out.exists():
        partial.rename(out)
        return
    old = _sibling(out, "old")
    out.rename(old)
    partial.rename(out)
    shutil.rmtree(old)


def _sibling(out: Path, suffix: str) -> Path:
    """A free name beside ``out``; what a killed process left there is removed."""
    path = out.with_name(f".{out.name}.{suffix}")
    shutil.rmtree(path, ignore_errors=True)
    return path


def _check_free(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out}: it is a file; give a folder to export to")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{out}: the folder is not empty; give another one, or ask for it to be overwritten")
    if not (out / "config.json").is_file():
        raise UserError(f"{out}: the folder holds something else than a model, so it is not overwritten; give another")


def tokenizer_files(folder: Path) -> list[Path]:
    found = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not {path.name for path in found} & {"tokenizer.model", "tokenizer.json"}:
        raise UserError(f"{folder}: neither tokenizer.model nor tokenizer.json is there; give a tokenizer's folder")
    return found


def _parse_size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]B)", text)
    if not match or not float(match[1]):
        raise UserError(f"max_shard_size is {text!r}; write a number and KB, MB, GB or TB, such as '5GB'")
    return max(1, int(float(match[1]) * _UNITS[match[2]]))


def _dump(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"
