"""Named tensors, read from where they lie, in whole or in part."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from gemma_xla.errors import UserError
from gemma_xla.hf.config import read_json
from gemma_xla.model.config import GemmaConfig
from gemma_xla.model.gemma import Gemma

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class TensorReader(Protocol):
    """A source of named tensors, such as a model folder or a checkpoint."""

    def names(self) -> list[str]:
        """The tensors' names, those of ``transformers.GemmaForCausalLM``."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole tensor's shape."""

    def dtype(self, name: str) -> torch.dtype:
        """The type it is stored in."""

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> torch.Tensor:
        """The tensor on the CPU, or the part that ``index`` selects (slices of step 1)."""


class HfReader(TensorReader):
    """Reads the safetensors files of a local Hugging Face folder: one file, or shards and their index.

    A ``lm_head.weight`` that repeats the embedding, as some programs write it, is left out.

    Raises:
        UserError: files are missing or damaged, or ``lm_head.weight`` is not the embedding.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._files: dict[Path, Any] = {}
        self._file_of = self._locate()
        if _HEAD in self._file_of and _EMBEDDING in self._file_of:
            if not torch.equal(self.read(_HEAD), self.read(_EMBEDDING)):
                raise UserError(f"{self._file_of[_HEAD]}: {_HEAD} differs from {_EMBEDDING}; Gemma has one for both")
            del self._file_of[_HEAD]

    def names(self) -> list[str]:
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        stored = self._slice(name).get_dtype()
        if stored not in _DTYPES:
            raise UserError(f"{self._file_of[name]}: {name} is stored as {stored}; use one of {', '.join(_DTYPES)}")
        return _DTYPES[stored]

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> torch.Tensor:
        return self._slice(name)[index or ...]

    def _locate(self) -> dict[str, Path]:
        single, index = self.folder / WEIGHTS, self.folder / INDEX
        if single.is_file():
            return dict.fromkeys(self._open(single).keys(), single)
        if not index.is_file():
            raise UserError(f"{self.folder}: neither {WEIGHTS} nor {INDEX} is there; give a folder with safetensors")
        return {name: self.folder / file for name, file in read_json(index).get("weight_map", {}).items()}

    def _open(self, path: Path) -> Any:
        if path not in self._files:
            try:
                self._files[path] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path}: cannot be read ({error}); write or download it again") from error
        return self._files[path]

    def _slice(self, name: str) -> Any:
        path = self._file_of[name]
        try:
            return self._open(path).get_slice(name)
        except SafetensorError as error:
            raise UserError(f"{path}: {name} is not in it, though {INDEX} says so; download it again") from error


def check_tensors(reader: TensorReader, config: GemmaConfig, origin: str) -> list[str]:
    """Return the names of a Gemma's parameters in the model's order, once it is sure that ``reader`` has just those.

    Raises:
        UserError: tensors are missing, left over, or of another shape or type; ``origin`` is named.
    """
    with torch.device("meta"):
        expected = {name: tuple(p.shape) for name, p in Gemma(config).named_parameters()}
    found = set(reader.names())
    for kind, names in (
        ("is missing", expected.keys() - found),
        ("does not belong in a Gemma", found - expected.keys()),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise UserError(
                f"{origin}: tensor {min(names)}{more} {kind}; check that weights and config belong together"
            )
    for name, shape in expected.items():
        if reader.shape(name) != shape:
            raise UserError(f"{origin}: {name} has shape {list(reader.shape(name))}; the config asks for {list(shape)}")
        reader.dtype(name)
    return list(expected)
