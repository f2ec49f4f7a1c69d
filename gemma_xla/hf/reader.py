"""Named tensors, read from where they lie, in whole or in part."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from gemma_xla.errors import UserError
from gemma_xla.hf.config import read_json
from gemma_xla.model.config import GemmaConfig
from gemma_xla.model.gemma import Gemma
from gemma_xla.storage import location
from gemma_xla.tensor_file import CHUNK, Index, TensorFile

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class TensorReader(Protocol):
    """A source of named tensors, such as a model folder or a checkpoint."""

    def names(self) -> list[str]:
        """The tensors' names, those of ``transformers.GemmaForCausalLM``."""

    def where(self, name: str) -> str:
        """The file or folder a tensor is in, for messages."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole tensor's shape."""

    def dtype(self, name: str) -> torch.dtype:
        """The type it is stored in."""

    def read(self, name: str, index: Index | None = None) -> torch.Tensor:
        """The tensor on the CPU, or the part that ``index`` selects (slices of step 1)."""

    def copy_to(self, name: str, out: torch.Tensor, index: Index | None = None) -> None:
        """Fill a CPU tensor of any floating dtype with what `read` would return, a few megabytes at a time."""


class HfReader(TensorReader):
    """Reads the safetensors files of a Hugging Face folder: one file, or shards and their index.

    A ``lm_head.weight`` that repeats the embedding, as some programs write it, is left out.

    Raises:
        UserError: files are missing or damaged, or ``lm_head.weight`` is not the embedding.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = location(folder)
        self._file_of = self._open()
        if _HEAD in self._file_of and _EMBEDDING in self._file_of:
            if not self._head_is_embedding():
                raise UserError(
                    f"{self.where(_HEAD)}: {_HEAD} differs from {_EMBEDDING}; Gemma has one for both, so take a model "
                    "whose output layer is its embedding"
                )
            del self._file_of[_HEAD]

    def names(self) -> list[str]:
        return list(self._file_of)

    def where(self, name: str) -> str:
        return str(self._file_of[name].path)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file_of[name].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._file_of[name].dtype(name)

    def read(self, name: str, index: Index | None = None) -> torch.Tensor:
        return self._file_of[name].read(name, index)

    def copy_to(self, name: str, out: torch.Tensor, index: Index | None = None) -> None:
        self._file_of[name].copy_to(name, out, index)

    def _open(self) -> dict[str, TensorFile]:
        """The file of each tensor."""
        if (self.folder / WEIGHTS).is_file():
            file = TensorFile(self.folder / WEIGHTS)
            return dict.fromkeys(file.names(), file)
        index = self.folder / INDEX
        if not index.is_file():
            raise UserError(
                f"{self.folder}: neither {WEIGHTS} nor {INDEX} is there; convert weights of another format, such as "
                "pytorch_model.bin, to safetensors first: nothing is ever unpickled"
            )
        listed = _listed(index)
        files = {shard: TensorFile(self.folder / shard) for shard in sorted(set(listed.values()))}
        for name, shard in listed.items():
            if name not in files[shard].names():
                raise UserError(
                    f"{self.folder / shard}: {name} is not in it, though {INDEX} says so; download both again"
                )
        for shard, file in files.items():
            if unlisted := set(file.names()) - listed.keys():
                raise UserError(
                    f"{self.folder / shard}: {min(unlisted)} is in it, though {INDEX} does not list it; download both "
                    "again"
                )
        return {name: files[shard] for name, shard in listed.items()}

    def _head_is_embedding(self) -> bool:
        shape = self.shape(_HEAD)
        if shape != self.shape(_EMBEDDING) or len(shape) != 2:
            return False
        step = max(1, CHUNK // (8 * max(1, shape[1])))
        parts = ((slice(start, start + step),) for start in range(0, shape[0], step))
        return all(torch.equal(self.read(_HEAD, at).double(), self.read(_EMBEDDING, at).double()) for at in parts)


def _listed(index: Path) -> dict[str, str]:
    """The file that an index of shards gives for each tensor.

    Raises:
        UserError: it gives none, or one that may not be in its folder.
    """
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise UserError(f"{index}: weight_map is {str(listed)[:80]}; download it again")
    for name, shard in listed.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or set(shard) & set("/\\:"):
            raise UserError(
                f"{index}: {name} is said to be in {shard!r}; it must be a .safetensors file of the same folder, so "
                "download the index again"
            )
    return listed


def check_tensors(reader: TensorReader, config: GemmaConfig, origin: str) -> list[str]:
    """Return the names of a Gemma's parameters in the model's order, once it is sure that ``reader`` has just those.

    Raises:
        UserError: tensors are missing (``origin`` is named), left over, or of another shape or type.
    """
    advice = "check that weights and config belong together"
    with torch.device("meta"):
        expected = {name: tuple(p.shape) for name, p in Gemma(config).named_parameters()}
    found = set(reader.names())
    if missing := expected.keys() - found:
        raise UserError(f"{origin}: tensor {_first(missing)} is missing; {advice}")
    if extra := found - expected.keys():
        raise UserError(f"{reader.where(min(extra))}: tensor {_first(extra)} does not belong in a Gemma; {advice}")
    for name, shape in expected.items():
        stored, dtype = tuple(reader.shape(name)), reader.dtype(name)
        if stored != shape:
            raise UserError(
                f"{reader.where(name)}: {name} has shape {list(stored)}; the config asks for {list(shape)}; {advice}"
            )
        if dtype not in _DTYPES:
            raise UserError(f"{reader.where(name)}: {name} is stored as {_short(dtype)}; use one of {_short(*_DTYPES)}")
    return list(expected)


def _first(names: set[str]) -> str:
    return f"{min(names)} (and {len(names) - 1} more)" if len(names) > 1 else min(names)


def _short(*dtypes: torch.dtype) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
