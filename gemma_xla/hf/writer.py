"""Writes a Hugging Face model folder, a tensor at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from tqdm import tqdm

from gemma_xla.errors import UserError, nearest
from gemma_xla.hf.config import config_json, generation_config_json
from gemma_xla.hf.folder import MODEL, check_free, tokenizer_files, whole_or_nothing
from gemma_xla.hf.reader import INDEX, TensorReader, check_tensors
from gemma_xla.model.config import GemmaConfig
from gemma_xla.storage import copy_file, is_local, location, persistently, replace_text
from gemma_xla.tensor_file import Entry, write_tensors

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
    end_tokens: Sequence[int] = (),
    overwrite: bool = False,
) -> Path:
    """Write a model folder that transformers and the programs around it load; return its path.

    A local folder appears whole or not at all: until it is done it is written beside ``out`` under another name. At a
    URL nothing can be renamed at once: a model that is to be replaced is deleted first, and ``config.json``, without
    which a folder is no model, is written last. One tensor is in memory at a time.

    Args:
        out: a local folder, or a URL such as gs://bucket/model.
        tokenizer: the folder whose tokenizer files are copied.
        dtype: what weights are stored as: float32, bfloat16 or float16.
        max_shard_size: the largest weight file, such as "5GB".
        card: the text of ``README.md``.
        end_tokens: all that end an answer; none: the config's end of a sequence.
        overwrite: replace the model folder that is already there.

    Raises:
        UserError: an argument is impossible, ``out`` is taken or cannot be written to, or the tensors do not fit the
            config.
    """
    out = absolute(out)
    stored = parse_dtype(dtype)
    limit = parse_size(max_shard_size)
    texts = {"generation_config.json": dump_json(generation_config_json(config, end_tokens))}
    if card is not None:
        texts["README.md"] = card
    texts[MODEL.config] = dump_json(config_json(config, dtype))
    copies = tokenizer_files(location(tokenizer)) if tokenizer is not None else []
    names = check_tensors(reader, config, f"export to {out}")
    check_free(out, overwrite, reader)

    with whole_or_nothing(out) as folder:
        _write_weights(reader, names, folder, stored, limit)
        for path in copies:
            copy_file(path, folder / path.name)
        for name, text in texts.items():
            replace_text(folder / name, text)
    return out


def _write_weights(reader: TensorReader, names: list[str], folder: Path, dtype: torch.dtype, limit: int) -> None:
    entries = {name: Entry(dtype, reader.shape(name)) for name in names}
    plan = split_state_dict_into_shards_factory(
        entries,
        get_storage_size=lambda entry: entry.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    total = sum(entry.nbytes for entry in entries.values())
    with progress(total) as bar:
        for shard, held in plan.filename_to_tensors.items():
            write_file(folder / shard, reader, {name: entries[name] for name in held}, bar)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        replace_text(folder / INDEX, dump_json(index))


def progress(total: int) -> tqdm:
    # disable=None: no bar when the output is not a terminal.
    return tqdm(total=total, desc="export", unit="B", unit_scale=True, delay=1, disable=None)


def write_file(path: Path, reader: TensorReader, entries: dict[str, Entry], bar: tqdm, prefix: str = "") -> None:
    """Write one file of weights; in it, ``prefix`` stands before each of the reader's names."""
    stored, done = {prefix + name: entry for name, entry in entries.items()}, bar.n

    def write() -> None:
        bar.n = done
        with path.open("wb") as file:
            write_tensors(file, stored, _values(reader, entries, bar), metadata={"format": "pt"})

    persistently(write, f"writing {path}", path)


def _values(reader: TensorReader, entries: dict[str, Entry], bar: tqdm) -> Iterator[torch.Tensor]:
    for name, entry in entries.items():
        yield _read(reader, name, entry)
        bar.update(entry.nbytes)


def _read(reader: TensorReader, name: str, entry: Entry) -> torch.Tensor:
    # A function of its own: nothing holds on to the tensor while the next one is read.
    values = torch.empty(entry.shape, dtype=entry.dtype)
    reader.copy_to(name, values)
    return values


def absolute(out: str | Path) -> Path:
    """A folder to write to, whatever the current folder is by then."""
    out = location(out)
    return out.absolute() if is_local(out) else out


def parse_dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise UserError(f"dtype is {name!r}; it must be one of {', '.join(_DTYPES)}{nearest(name, _DTYPES)}")
    return _DTYPES[name]


def parse_size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]B)", text)
    if not match or not float(match[1]):
        raise UserError(f"max_shard_size is {text!r}; write a number and KB, MB, GB or TB, such as '5GB'")
    return max(1, int(float(match[1]) * _UNITS[match[2]]))


def dump_json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"
