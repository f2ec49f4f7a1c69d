"""Hugging Face's ``config.json`` for Gemma, in and out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemma_xla.errors import UserError
from gemma_xla.model.config import GemmaConfig
from gemma_xla.storage import location, reason

# Fields that have the same name and meaning in config.json.
_FIELDS = [
    field.name
    for field in dataclasses.fields(GemmaConfig)
    if field.name not in ("rope_theta", "sliding_window", "layer_types")
]
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
_TOKEN_IDS = ("pad_token_id", "eos_token_id", "bos_token_id")
# What the other keys may say (the last value is the usual one). The first releases of Gemma say "gelu" in `hidden_act`
# and mean its tanh form; in `hidden_activation` the word means what it says.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": (None, "gelu", "gelu_pytorch_tanh"),
    "hidden_activation": (None, "gelu_pytorch_tanh"),
    "attention_bias": (None, False),
    "attention_dropout": (None, 0.0),
    "tie_word_embeddings": (None, True),
    "use_bidirectional_attention": (False, None),
    "rope_scaling": (None,),
    "quantization_config": (None,),
}


def read_config(folder: str | Path) -> GemmaConfig:
    """Read ``config.json`` as transformers 4 or 5 writes it.

    Where it lists several end-of-sequence ids, the first is taken.

    Raises:
        UserError: the file is missing, describes something else than a Gemma, or lacks a field.
    """
    path = location(folder) / "config.json"
    raw = read_json(path)
    if raw.get("model_type") != "gemma":
        raise UserError(f"{path}: model_type is {raw.get('model_type')!r}; only 'gemma' (Gemma 1) can be read")
    for key, supported in _SUPPORTED.items():
        if raw.get(key) not in supported:
            raise UserError(f"{path}: {key} is {raw[key]!r}; only {supported[-1]!r} is supported")
    fields = {name: raw[name] for name in _FIELDS if raw.get(name) is not None}
    missing = [name for name in _REQUIRED if name not in fields]
    if missing:
        raise UserError(f"{path}: {', '.join(missing)} missing; take config.json from the model's original folder")
    fields["rope_theta"] = _rope_theta(raw, path)
    for name in _TOKEN_IDS:
        fields[name] = _token_id(fields.get(name, getattr(GemmaConfig, name)), name, path)
    try:
        return GemmaConfig().replace(**fields)
    except UserError as error:
        raise UserError(f"{path}: {str(error).removeprefix('model: ')}") from None


def config_json(config: GemmaConfig, dtype: str) -> dict[str, Any]:
    """The contents of ``config.json``, for every transformers that knows Gemma (4.38 on) and for other programs.

    Raises:
        UserError: the model has sliding-window layers.
    """
    if config.layer_types is not None and "sliding_attention" in config.layer_types:
        raise UserError(
            "model: layer_types has sliding layers, which Hugging Face's Gemma does not know; use full ones"
        )
    return {
        "architectures": ["GemmaForCausalLM"],
        "model_type": "gemma",
        **{name: getattr(config, name) for name in _FIELDS},
        # `hidden_act` alone: 4.38 and 4.48 on read it; 4.39 to 4.47 read only `hidden_activation` and, where it is
        # absent, take the tanh form. Some programs refuse a file with both.
        "hidden_act": "gelu_pytorch_tanh",
        "rope_theta": config.rope_theta,  # transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},  # transformers 5
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "use_cache": True,
        "torch_dtype": dtype,  # transformers 4
        "dtype": dtype,  # transformers 5
    }


def generation_config_json(config: GemmaConfig, end_tokens: Sequence[int] = ()) -> dict[str, Any]:
    """The contents of ``generation_config.json``; ``end_tokens``: all that end an answer."""
    found = {name: getattr(config, name) for name in _TOKEN_IDS}
    return found | ({"eos_token_id": list(end_tokens)} if len(end_tokens) > 1 else {})


def read_end_tokens(folder: Path) -> tuple[int, ...]:
    """What ends an answer according to a folder's ``generation_config.json``; nothing if it does not say."""
    path = folder / "generation_config.json"
    found = read_json(path).get("eos_token_id") if path.is_file() else None
    return tuple(found) if isinstance(found, list) else () if found is None else (found,)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        UserError: it is missing or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {reason(error)}; give the folder of a Hugging Face model") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}; write or download it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: it must hold a JSON object; write or download it again")
    return value


def _rope_theta(raw: dict[str, Any], path: Path) -> Any:
    rope = raw.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise UserError(f"{path}: rope_parameters.rope_type is {rope['rope_type']!r}; only 'default' is supported")
    return rope.get("rope_theta", raw.get("rope_theta", GemmaConfig.rope_theta))


def _token_id(value: Any, name: str, path: Path) -> int:
    first = value[0] if isinstance(value, list) and value else value
    if type(first) is not int:
        raise UserError(f"{path}: {name} is {value!r}; it must be a token id")
    return first
