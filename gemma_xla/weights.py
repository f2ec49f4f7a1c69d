"""Whatever has a Gemma's weights, opened under one roof: Hugging Face folders and hub ids, runs, adapters."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gemma_xla import hf
from gemma_xla.checkpoint import CheckpointReader, check, complete, open_run
from gemma_xla.checkpoint.folder import folder_name, step_of
from gemma_xla.config import RunConfig
from gemma_xla.config_file import validate
from gemma_xla.errors import UserError
from gemma_xla.hf import TensorReader
from gemma_xla.model.config import GemmaConfig
from gemma_xla.storage import is_local, location
from gemma_xla.tensor_file import Index

# Elements looked at, at either end of a tensor.
_SAMPLE = 256


@dataclass(frozen=True)
class Weights:
    """A model's tensors and what else it takes to use them."""

    reader: TensorReader
    config: GemmaConfig
    # The folder, local or a URL, with its tokenizer.
    tokenizer: Path
    # What it is, for messages.
    description: str
    # What ends its answers, where that is more than the end of a sequence.
    end_tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint of a run."""

    run: Path
    # What was trained: the weights or, with LoRA, the adapter alone.
    reader: CheckpointReader
    architecture: GemmaConfig
    config: RunConfig
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return self.state["step"]

    def weights(self) -> Weights:
        """The whole model; with LoRA, the base and the adapter merged.

        Raises:
            UserError: the base is no longer where it was, or another one.
        """
        reader = self.reader if self.config.lora is None else self._merged()
        description = f"{self.run}, step {self.step}"
        return Weights(reader, self.architecture, self.run / "tokenizer", description, self.end_tokens)

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """What ends the model's answers."""
        return tuple(self.state.get("end_tokens", ()))

    def _merged(self) -> hf.MergedReader:
        try:
            base = _open_base(resolve_base(self.config.model.init_from, lora=True))
        except UserError as error:
            raise UserError(
                f"{self.run}: its base cannot be read: model.init_from: {error}; or, if it has moved, run `gemma-xla "
                f"export {self.run} OUT` and set base_model_name_or_path in OUT/adapter_config.json"
            ) from error
        if fingerprint(base) != self.state["base"]:
            raise UserError(
                f"{self.run}: model.init_from, {self.config.model.init_from}, no longer holds the weights that the "
                "adapter was trained on; bring them back"
            )
        return hf.MergedReader(base, self.reader, self.config.lora)


def open_weights(name_or_path: str | Path) -> Weights:
    """Open a Hugging Face folder or hub id, a run of ours at its newest checkpoint, or a peft adapter with its base.

    Raises:
        UserError: it is none of these, or its base is not to be found.
    """
    folder = location(name_or_path)
    if is_run(folder):
        return open_checkpoint(folder).weights()
    folder = hf.resolve(name_or_path)
    if hf.is_adapter_folder(folder):
        return _open_adapter(folder)
    config = hf.read_config(folder)
    return Weights(hf.HfReader(folder), config, folder, str(name_or_path), hf.read_end_tokens(folder))


def open_checkpoint(run: Path, step: int | None = None, say: Callable[[str], None] = print) -> Checkpoint:
    """Open a checkpoint of a run, checking that it is whole.

    Args:
        run: its folder.
        step: which; None: the newest that is whole.
        say: told of checkpoints that are passed over.

    Raises:
        UserError: there is none.
    """
    if step is None:
        reader, architecture, state = open_run(run, say)
    else:
        folder = _checkpoint_of(run, step)
        state = check(folder)
        reader, architecture = CheckpointReader(folder, "model/"), GemmaConfig(**state["model"])
    return Checkpoint(run, reader, architecture, validate(state["config"], str(run)), state)


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run of ours."""
    try:
        return (folder / "checkpoints").is_dir()
    except OSError:
        return False


def resolve_base(init_from: str, lora: bool) -> Path:
    """Return the folder that training starts from, what ``model.init_from`` names, for `open_weights`.

    An adapter must be of use to other programs: its base is a Hugging Face folder or hub id or, for a run, the folder
    that it exported.

    Raises:
        UserError: there is no such thing, or the run has exported nothing.
    """
    folder = location(init_from)
    if is_run(folder):
        if not lora:
            return folder
        if not (folder / "export" / hf.MODEL.config).is_file():
            raise UserError(
                f"{folder}: it is a run without the folder export/, which an adapter needs as its base; run "
                f"`gemma-xla export {folder} OUT` (a run with LoRA: add --merge) and name OUT"
            )
        return folder / "export"
    folder = hf.resolve(init_from)
    if lora and hf.is_adapter_folder(folder):
        raise UserError(
            f"{init_from}: it is an adapter, beside which no other can be trained; run `gemma-xla export {init_from} "
            "OUT --merge` and name OUT"
        )
    return folder


def read_architecture(init_from: str, lora: bool) -> GemmaConfig:
    """The architecture of what training starts from; of a model on the hub nothing but its config is fetched.

    Raises:
        UserError: there is no such thing.
    """
    if is_run(location(init_from)) or location(init_from).is_dir():
        return open_weights(resolve_base(init_from, lora)).config
    return hf.read_config(hf.resolve(init_from, weights=False))


def base_name(init_from: str, lora: bool) -> str:
    """What a model or an adapter calls its base: the hub id, or the folder's full path."""
    folder = location(init_from)
    if lora and is_run(folder):
        folder = folder / "export"
    elif not folder.is_dir():
        return init_from
    return str(folder.absolute() if is_local(folder) else folder)


def fingerprint(reader: TensorReader) -> str:
    """What tells one model's tensors from another's: a digest of their names, shapes and types, and of both ends of
    each."""
    digest = hashlib.sha256()
    for name in sorted(reader.names()):
        shape = reader.shape(name)
        digest.update(f"{name} {list(shape)} {reader.dtype(name)}\n".encode())
        for part in _ends(shape):
            digest.update(reader.read(name, part).contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _ends(shape: tuple[int, ...]) -> list[Index]:
    """The beginning of a tensor's first row, and the end of its last one."""
    if not shape:
        return [()]
    first = tuple(slice(0, 1) for _ in shape[:-1])
    last = tuple(slice(size - 1, size) for size in shape[:-1])
    return [(*first, slice(0, _SAMPLE)), (*last, slice(max(0, shape[-1] - _SAMPLE), None))]


def _checkpoint_of(run: Path, step: int) -> Path:
    found = {step_of(folder): folder for folder in complete(run / "checkpoints")}
    if step not in found:
        there = ", ".join(map(str, found)) or "none"
        raise UserError(f"{run / 'checkpoints'}: {folder_name(step)} is not there or not complete; there are {there}")
    return found[step]


def _open_adapter(folder: Path) -> Weights:
    adapter = hf.AdapterReader(folder)
    path = folder / hf.ADAPTER.config
    if adapter.base_model is None:
        raise UserError(f"{path}: base_model_name_or_path is missing; set it to the folder or hub id of its base model")
    try:
        root = resolve_base(adapter.base_model, lora=True)
        base = _open_base(root)
    except UserError as error:
        raise UserError(
            f"{path}: base_model_name_or_path: {error}; or set it to where the base model is now"
        ) from error
    own = any((folder / name).is_file() for name in hf.TOKENIZER_FILES)
    reader = hf.MergedReader(base, adapter, adapter.lora)
    description = f"{folder}, an adapter for {adapter.base_model}"
    ends = hf.read_end_tokens(folder) or hf.read_end_tokens(root)
    return Weights(reader, hf.read_config(root), folder if own else root, description, ends)


def _open_base(folder: Path) -> hf.HfReader:
    reader = hf.HfReader(folder)
    hf.check_tensors(reader, hf.read_config(folder), str(folder))
    return reader
