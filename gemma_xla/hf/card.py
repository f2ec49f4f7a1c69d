"""The README.md of an exported model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import yaml

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
) -> str:
    """Return a Hugging Face model card: Markdown under YAML front matter.

    Args:
        name: the model's folder or hub id.
        sources: what it was trained on, a line each.
        metrics: what the run ended with, such as steps, tokens, eval loss, MFU; values are printed as they are.
        run_config: the run's resolved YAML.
        base_model: the hub id it was fine-tuned from; None: trained from scratch.
        license: a licence id of the hub; None: no claim.
    """
    sections = [
        _front_matter(base_model, license),
        f"# {name.rstrip('/').rpartition('/')[2]}",
        f"{_origin(base_model)} with PyTorch by gemma_xla.",
        _usage(name),
        "## Architecture\n\n" + _table(_architecture(config)),
    ]
    if sources:
        sections.append("## Training data\n\n" + "\n".join(f"- {source}" for source in sources))
    if metrics:
        sections.append("## Results\n\n" + _table(metrics))
    if run_config:
        sections.append(_details(run_config))
    return "\n\n".join(sections) + "\n"


def _front_matter(base_model: str | None, license: str | None) -> str:
    fields = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gemma"],
        "base_model": base_model,
        "license": license,
    }
    given = {key: value for key, value in fields.items() if value is not None}
    return f"---\n{yaml.safe_dump(given, sort_keys=False)}---"


def _origin(base_model: str | None) -> str:
    return f"A Gemma fine-tuned from `{base_model}`" if base_model else "A Gemma trained from scratch"


def _usage(name: str) -> str:
    return (
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
        f'model = AutoModelForCausalLM.from_pretrained("{name}")\n'
        "```"
    )


def _architecture(config: GemmaConfig) -> dict[str, str]:
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Gemma(config).parameters())
    return {"parameters": f"{parameters:,}", **{size: f"{getattr(config, size):,}" for size in _SIZES}}


def _table(rows: Mapping[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])


def _details(run_config: str) -> str:
    # Four backticks: the config may itself hold three.
    return f"<details>\n<summary>Run configuration</summary>\n\n````yaml\n{run_config.strip()}\n````\n\n</details>"
