"""The README.md of an exported model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from gemma_xla.config import LoraSection
from gemma_xla.model.config import GemmaConfig
from gemma_xla.model.gemma import Gemma

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


def model_card(
    name: str,
    config: GemmaConfig,
    *,
    sources: Sequence[str] = (),
    metrics: Mapping[str, Any] | None = None,
    run_config: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    lora: LoraSection | None = None,
) -> str:
    """Return a Hugging Face model card: Markdown under YAML front matter.

    Args:
        name: the model's folder or hub id.
        sources: what it was trained on, a line each.
        metrics: what the run ended with, such as steps, tokens, eval loss, MFU; values are printed as they are.
        run_config: the run's resolved YAML.
        base_model: the hub id or folder it was fine-tuned from; None: trained from scratch.
        license: a licence id of the hub; None: no claim.
        lora: of an adapter to ``base_model``; None: it is a whole model.
    """
    sections = [
        _front_matter(base_model, license, "peft" if lora else "transformers"),
        f"# {name.rstrip('/').rpartition('/')[2]}",
        f"{_origin(base_model, lora)} with PyTorch by gemma_xla.",
        _usage_of_adapter(name, base_model) if lora else _usage(name),
    ]
    if lora:
        sections.append("## Adapter\n\n" + _table({key: _text(value) for key, value in lora.model_dump().items()}))
    sections.append("## Architecture\n\n" + _table(_architecture(config)))
    if sources:
        sections.append("## Training data\n\n" + "\n".join(f"- {source}" for source in sources))
    if metrics:
        sections.append("## Results\n\n" + _table(metrics))
    if run_config:
        sections.append(_details(run_config))
    return "\n\n".join(sections) + "\n"


def _front_matter(base_model: str | None, license: str | None, library: str) -> str:
    fields = {
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": ["gemma", *(["lora"] if library == "peft" else [])],
        # The hub refuses a card that names a folder.
        "base_model": base_model if base_model and _is_hub_id(base_model) else None,
        "license": license,
    }
    given = {key: value for key, value in fields.items() if value is not None}
    return f"---\n{yaml.safe_dump(given, sort_keys=False)}---"


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _origin(base_model: str | None, lora: LoraSection | None) -> str:
    if lora:
        return f"A LoRA adapter for `{base_model}`, trained"
    return f"A Gemma fine-tuned from `{base_model}`" if base_model else "A Gemma trained from scratch"


def _usage(name: str) -> str:
    return (
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
        f'model = AutoModelForCausalLM.from_pretrained("{name}")\n'
        "```"
    )


def _usage_of_adapter(name: str, base_model: str | None) -> str:
    return (
        "```python\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
        f'base = AutoModelForCausalLM.from_pretrained("{base_model}")\n'
        f'model = PeftModel.from_pretrained(base, "{name}")\n'
        "```"
    )


def _architecture(config: GemmaConfig) -> dict[str, str]:
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Gemma(config).parameters())
    return {"parameters": f"{parameters:,}", **{size: f"{getattr(config, size):,}" for size in _SIZES}}


def _table(rows: Mapping[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])


def _text(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else f"{value:g}" if isinstance(value, float) else str(value)


def _details(run_config: str) -> str:
    # Four backticks: the config may itself hold three.
    return f"<details>\n<summary>Run configuration</summary>\n\n````yaml\n{run_config.strip()}\n````\n\n</details>"
