"""peft's adapter folders, in and out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from gemma_xla.config import LoraSection
from gemma_xla.errors import UserError
from gemma_xla.hf.config import read_json
from gemma_xla.hf.folder import ADAPTER, check_free, tokenizer_files, whole_or_nothing
from gemma_xla.hf.merge import adapted_modules
from gemma_xla.hf.reader import TensorReader
from gemma_xla.hf.writer import absolute, parse_dtype, progress, write_file
from gemma_xla.model.config import LORA_TARGETS
from gemma_xla.storage import copy_file, location, replace_text
from gemma_xla.tensor_file import Entry, Index, TensorFile

# peft wraps a model twice.
_PREFIX = "base_model.model."
_WEIGHTS = "adapter_model.safetensors"
_ADVICE = "merge it with peft (merge_and_unload, save_pretrained) and use the model that this makes"
# Our names for what a LoraSection holds.
_FIELDS = {
    "rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "target_modules": "target_modules",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}
# What these say changes nothing, or nothing that the tensors do not show.
_IRRELEVANT = (
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "runtime_config"),
    *("loftq_config", "eva_config", "megatron_core", "qalora_group_size"),
)
# Of what is neither of these, what else may be said than nothing at all.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
    # Those that leave the base's weights as they are.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}


def is_adapter_folder(folder: Path) -> bool:
    """Whether a folder holds an adapter as peft writes it."""
    return (folder / ADAPTER.config).is_file()


class AdapterReader(TensorReader):
    """The tensors of an adapter folder, under our names, and what its config says.

    Attributes:
        lora: rank, scaling and targets.
        base_model: the folder or hub id of the model it was made for; None if it does not say.

    Raises:
        UserError: files are missing or damaged, or it is more than a LoRA adapter of a Gemma's matrices.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = location(folder)
        path = self.folder / ADAPTER.config
        raw = read_json(path)
        self.lora = _section(raw, path)
        self.base_model: str | None = raw.get("base_model_name_or_path") or None
        if not (self.folder / _WEIGHTS).is_file():
            raise UserError(
                f"{self.folder}: {_WEIGHTS} is not there; download it again, or convert adapter_model.bin to "
                "safetensors first: nothing is ever unpickled"
            )
        self._file = TensorFile(self.folder / _WEIGHTS)
        for name in self._file.names():
            if not name.startswith(_PREFIX):
                raise UserError(f"{self._file.path}: {name!r} does not begin with {_PREFIX!r}; save it again with peft")
        adapted_modules(self, self.lora)

    def names(self) -> list[str]:
        return [name.removeprefix(_PREFIX) for name in self._file.names()]

    def where(self, name: str) -> str:
        return str(self._file.path)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file.shape(_PREFIX + name)

    def dtype(self, name: str) -> torch.dtype:
        return self._file.dtype(_PREFIX + name)

    def read(self, name: str, index: Index | None = None) -> torch.Tensor:
        return self._file.read(_PREFIX + name, index)

    def copy_to(self, name: str, out: torch.Tensor, index: Index | None = None) -> None:
        self._file.copy_to(_PREFIX + name, out, index)


def export_adapter(
    reader: TensorReader,
    lora: LoraSection,
    out: str | Path,
    *,
    base_model: str,
    tokenizer: str | Path | None = None,
    dtype: str = "float32",
    card: str | None = None,
    end_tokens: Sequence[int] = (),
    overwrite: bool = False,
) -> Path:
    """Write an adapter folder that `peft.PeftModel.from_pretrained` loads; return its path.

    It appears whole or not at all, as a model does (`gemma_xla.hf.export`).

    Args:
        reader: the adapter's tensors, and no others.
        out: a local folder, or a URL such as gs://bucket/adapter.
        base_model: the folder or hub id of the model it belongs to.
        tokenizer: the folder whose tokenizer files are copied.
        dtype: what the tensors are stored as: float32, bfloat16 or float16.
        card: the text of ``README.md``.
        end_tokens: all that end an answer, for ``generation_config.json``.
        overwrite: replace the adapter folder that is already there.

    Raises:
        UserError: an argument is impossible, ``out`` is taken or cannot be written to, or tensors are missing.
    """
    out = absolute(out)
    stored = parse_dtype(dtype)
    adapted_modules(reader, lora)
    entries = {name: Entry(stored, reader.shape(name)) for name in reader.names()}
    texts = {"README.md": card} if card is not None else {}
    if len(end_tokens) > 1:
        texts["generation_config.json"] = json.dumps({"eos_token_id": list(end_tokens)}, indent=2) + "\n"
    texts[ADAPTER.config] = _config_json(lora, base_model)
    copies = tokenizer_files(location(tokenizer)) if tokenizer is not None else []
    check_free(out, overwrite, reader, ADAPTER)

    with whole_or_nothing(out, ADAPTER) as folder:
        with progress(sum(entry.nbytes for entry in entries.values())) as bar:
            write_file(folder / _WEIGHTS, reader, entries, bar, _PREFIX)
        for path in copies:
            copy_file(path, folder / path.name)
        for name, text in texts.items():
            replace_text(folder / name, text)
    return out


def _config_json(lora: LoraSection, base_model: str) -> str:
    """The text of ``adapter_config.json``, as peft itself writes it."""
    from peft import LoraConfig  # takes seconds

    given = {theirs: getattr(lora, ours) for ours, theirs in _FIELDS.items()}
    if lora.alpha.is_integer():  # as other programs expect it
        given["lora_alpha"] = int(lora.alpha)
    config = LoraConfig(
        **given, bias="none", task_type="CAUSAL_LM", base_model_name_or_path=base_model, inference_mode=True
    ).to_dict()
    # In the order of the sets that it makes of lists, equal adapters would differ.
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    return json.dumps(plain, indent=2, sort_keys=True) + "\n"


def _section(raw: dict[str, Any], path: Path) -> LoraSection:
    """What an ``adapter_config.json`` says in our words.

    Raises:
        UserError: it says something else, too.
    """
    for key, value in raw.items():
        if key in _FIELDS.values() or key in _IRRELEVANT:
            continue
        if key in _SUPPORTED:
            if value not in _SUPPORTED[key]:
                expected = ", ".join(map(repr, _SUPPORTED[key]))
                raise UserError(f"{path}: {key} is {value!r}; supported are {expected}: {_ADVICE}")
        elif value not in (None, False) and value != {} and value != []:
            raise UserError(f"{path}: {key} is {value!r}, which is not supported; {_ADVICE}")
    for key in ("r", "lora_alpha", "target_modules"):
        if key not in raw:
            raise UserError(f"{path}: {key} is missing; take the file from the adapter's origin")
    targets = raw["target_modules"]
    if not isinstance(targets, list) or not set(map(str, targets)) <= set(LORA_TARGETS):
        raise UserError(
            f"{path}: target_modules is {targets!r}; supported are lists of {', '.join(LORA_TARGETS)}: {_ADVICE}"
        )
    try:
        return LoraSection(**{ours: raw[theirs] for ours, theirs in _FIELDS.items() if theirs in raw})
    except ValidationError as error:
        first = error.errors()[0]
        key = _FIELDS[str(first["loc"][0])]
        raise UserError(f"{path}: {key} is {first['input']!r}; take the file from the adapter's origin") from error
