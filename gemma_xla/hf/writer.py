"""Writes a Hugging Face model folder, a tensor at a time."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from tqdm import tqdm

from gemma_xla.errors import UserError, nearest
from gemma_xla.hf.config import config_json, generation_config_json
from gemma_xla.hf.reader import INDEX, HfReader, TensorReader, check_tensors
from gemma_xla.model.config import GemmaConfig
from gemma_xla.storage import is_local, location, reason, remove_tree
from gemma_xla.tensor_file import Entry, write_tensors

CONFIG = "config.json"
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

    A local folder appears whole or not at all: until it is done it is written beside ``out`` under another name. At a
    URL nothing can be renamed at once: a model that is to be replaced is deleted first, and ``config.json``, without
    which a folder is no model, is written last. One tensor is in memory at a time.

    Args:
        out: a local folder, or a URL such as gs://bucket/model.
        tokenizer: the folder whose tokenizer files are copied.
        dtype: what weights are stored as: float32, bfloat16 or float16.
        max_shard_size: the largest weight file, such as "5GB".
        card: the text of ``README.md``.
        overwrite: replace the model folder that is already there.

    Raises:
        UserError: an argument is impossible, ``out`` is taken or cannot be written to, or the tensors do not fit the
            config.
    """
    out = location(out)
    out = out.absolute() if is_local(out) else out
    if dtype not in _DTYPES:
        raise UserError(f"dtype is {dtype!r}; it must be one of {', '.join(_DTYPES)}{nearest(dtype, _DTYPES)}")
    limit = parse_size(max_shard_size)
    texts = {"generation_config.json": _dump(generation_config_json(config))}
    if card is not None:
        texts["README.md"] = card
    texts[CONFIG] = _dump(config_json(config, dtype))
    copies = tokenizer_files(location(tokenizer)) if tokenizer is not None else []
    names = check_tensors(reader, config, f"export to {out}")
    check_free(out, overwrite, reader)

    with _whole_or_nothing(out) as folder:
        _write_weights(reader, names, folder, _DTYPES[dtype], limit)
        for path in copies:
            (folder / path.name).write_bytes(path.read_bytes())
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    return out


@contextlib.contextmanager
def _whole_or_nothing(out: Path) -> Iterator[Path]:
    """Give an empty folder that takes the place of ``out`` at the end of the block, and is removed if that fails."""
    # What is at a URL is replaced where it is.
    partial = _sibling(out, "partial") if is_local(out) else out
    try:
        _clear(partial)
        yield partial
        if is_local(out):
            _put_in_place(partial, out)
    except BaseException as error:
        # If even that fails, what is left is no model: it has no config.json.
        with contextlib.suppress(OSError):
            remove_tree(partial)
        if isinstance(error, OSError):
            raise UserError(
                f"{out}: {reason(error)}; make room, or export to another folder that you may write to: nothing was "
                "exported"
            ) from error
        raise


def _clear(folder: Path) -> None:
    (folder / CONFIG).unlink(missing_ok=True)
    remove_tree(folder)
    folder.mkdir(parents=True, exist_ok=True)


def _write_weights(reader: TensorReader, names: list[str], folder: Path, dtype: torch.dtype, limit: int) -> None:
    entries = {name: Entry(dtype, reader.shape(name)) for name in names}
    plan = split_state_dict_into_shards_factory(
        entries,
        get_storage_size=lambda entry: entry.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    total = sum(entry.nbytes for entry in entries.values())
    # disable=None: no bar when the output is not a terminal.
    with tqdm(total=total, desc="export", unit="B", unit_scale=True, delay=1, disable=None) as bar:
        for shard, held in plan.filename_to_tensors.items():
            with (folder / shard).open("wb") as file:
                here = {name: entries[name] for name in held}
                write_tensors(file, here, _values(reader, here, bar), metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(_dump(index), encoding="utf-8")


def _values(reader: TensorReader, entries: dict[str, Entry], bar: tqdm) -> Iterator[torch.Tensor]:
    for name, entry in entries.items():
        yield _read(reader, name, entry)
        bar.update(entry.nbytes)


def _read(reader: TensorReader, name: str, entry: Entry) -> torch.Tensor:
    # A function of its own: nothing holds on to the tensor while the next one is read.
    values = torch.empty(entry.shape, dtype=entry.dtype)
    reader.copy_to(name, values)
    return values


def _put_in_place(partial: Path, out: Path) -> None:
    if not out.exists():
        partial.rename(out)
        return
    old = _sibling(out, "old")
    remove_tree(old)
    out.rename(old)
    partial.rename(out)
    remove_tree(old)


def _sibling(out: Path, suffix: str) -> Path:
    """A hidden name beside ``out``."""
    return out.with_name(f".{out.name}.{suffix}")


def check_free(out: Path, overwrite: bool, reader: TensorReader | None = None) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out}: it is a file; give a folder to export to")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{out}: the folder is not empty; give another one, or ask for it to be overwritten")
    if not _is_model(out):
        raise UserError(f"{out}: the folder holds something else than a model, so it is not overwritten; give another")
    if not is_local(out) and isinstance(reader, HfReader) and reader.folder == out:
        raise UserError(f"{out}: it is read from, so it cannot be overwritten; give another folder")


def _is_model(folder: Path) -> bool:
    """Whether a folder that is not empty may be replaced: it is a model, or what is left of an export to a URL."""
    known = (INDEX, "README.md", "generation_config.json", *TOKENIZER_FILES)
    return (folder / CONFIG).is_file() or (
        not is_local(folder) and all(p.name in known or p.suffix == ".safetensors" for p in folder.iterdir())
    )


def tokenizer_files(folder: Path) -> list[Path]:
    found = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not {path.name for path in found} & {"tokenizer.model", "tokenizer.json"}:
        raise UserError(f"{folder}: neither tokenizer.model nor tokenizer.json is there; give a tokenizer's folder")
    return found


def parse_size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]B)", text)
    if not match or not float(match[1]):
        raise UserError(f"max_shard_size is {text!r}; write a number and KB, MB, GB or TB, such as '5GB'")
    return max(1, int(float(match[1]) * _UNITS[match[2]]))


def _dump(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"
