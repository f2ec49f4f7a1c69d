"""Folders that appear whole or not at all, and never in the place of something else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from gemma_xla.errors import UserError
from gemma_xla.hf.reader import INDEX, TensorReader
from gemma_xla.storage import is_local, make_folder, reason, remove_file, remove_tree

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


class Kind(NamedTuple):
    """What a folder holds."""

    name: str
    # Written last: without it the folder is none of its kind.
    config: str


MODEL = Kind("a model", "config.json")
ADAPTER = Kind("an adapter", "adapter_config.json")


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a folder that belong to its tokenizer.

    Raises:
        UserError: it has none.
    """
    found = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not {path.name for path in found} & {"tokenizer.model", "tokenizer.json"}:
        raise UserError(f"{folder}: neither tokenizer.model nor tokenizer.json is there; give a tokenizer's folder")
    return found


def check_free(out: Path, overwrite: bool, reader: TensorReader | None = None, kind: Kind = MODEL) -> None:
    """Make sure that a folder may be written.

    Args:
        overwrite: whether it may hold something of its kind.
        reader: what is to be written there.

    Raises:
        UserError: it is taken.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out}: it is a file; give a folder to export to")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{out}: the folder is not empty; give another one, or ask for it to be overwritten")
    if not _is_of_kind(out, kind):
        raise UserError(
            f"{out}: the folder holds something else than {kind.name}, so it is not overwritten; give another"
        )
    # A local folder is only replaced when the new one is whole.
    if reader is not None and not is_local(out) and any(_is_in(out, reader.where(name)) for name in reader.names()):
        raise UserError(f"{out}: it is read from, so it cannot be overwritten; give another folder")


@contextlib.contextmanager
def whole_or_nothing(out: Path, kind: Kind = MODEL) -> Iterator[Path]:
    """Give an empty folder that takes the place of ``out`` at the end of the block, and is removed if that fails.

    A local folder is written beside ``out`` under another name. At a URL nothing can be renamed at once: what is to be
    replaced is deleted first, and the block has to write ``kind.config`` last.

    Raises:
        UserError: it cannot be written to.
    """
    partial = _sibling(out, "partial") if is_local(out) else out
    try:
        remove_file(partial / kind.config)
        remove_tree(partial)
        make_folder(partial)
        yield partial
        if is_local(out):
            _put_in_place(partial, out)
    except BaseException as error:
        # If even that fails, what is left is no model: it has no config.json.
        with contextlib.suppress(Exception):
            remove_tree(partial)
        # The errors of a bucket have types of their own.
        of_bucket = not is_local(out) and isinstance(error, Exception) and not isinstance(error, UserError | ValueError)
        if of_bucket or isinstance(error, OSError):
            raise UserError(
                f"{out}: {reason(error)}; make room, or export to another folder that you may write to: nothing was "
                "exported"
            ) from error
        raise


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


def _is_of_kind(folder: Path, kind: Kind) -> bool:
    """Whether a folder that is not empty may be replaced: it is of that kind, or what is left of an export to a URL."""
    known = (INDEX, "README.md", "generation_config.json", *TOKENIZER_FILES)
    return (folder / kind.config).is_file() or (
        not is_local(folder) and all(p.name in known or p.suffix == ".safetensors" for p in folder.iterdir())
    )


def _is_in(folder: Path, place: str) -> bool:
    return place.startswith(f"{folder}/")
