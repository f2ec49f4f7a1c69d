"""The end of a run: curves, the Hugging Face folder, a sample, and where everything is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gemma_xla.checkpoint import open_run
from gemma_xla.config import RunConfig
from gemma_xla.config_file import dump_config, validate
from gemma_xla.hf import export, model_card
from gemma_xla.storage import fetched
from gemma_xla.train.metrics import plot, read_metrics, summary
from gemma_xla.train.run import Run


def finish(run: Run) -> None:
    """Draw, export, sample, and print what the run made. Call it on the first host."""
    folder = run.folder
    records = read_metrics(folder.metrics)
    plot(records, folder.work / "curves.png", folder.path.name)
    folder.publish()
    made = {
        "config": folder.config,
        "metrics": folder.metrics,
        "TensorBoard": folder.path / "tensorboard",
        "curves": folder.path / "curves.png",
        "tokenizer": folder.path / "tokenizer",
        "checkpoints": folder.checkpoints,
    }
    section = run.config.export
    if section.at_end:
        made["model"] = export_run(
            folder.path,
            folder.export,
            dtype=section.dtype,
            max_shard_size=section.max_shard_size,
            overwrite=True,
        )
        if run.config.log.sample_prompt is not None:
            run.say("\n" + sample(made["model"], run.config.log.sample_prompt))
    run.say("\n" + "\n".join(f"{name:>12}: {value}" for name, value in _rounded(summary(records)).items()))
    run.say("\n" + "\n".join(f"{name:>12}: {path}" for name, path in made.items() if path.exists()))


def export_run(folder: Path, out: Path, **options: Any) -> Path:
    """Write the newest checkpoint of the run in ``folder`` as a Hugging Face folder; return its path.

    Args:
        options: ``dtype``, ``max_shard_size`` and ``overwrite`` of `gemma_xla.hf.export`.

    Raises:
        UserError: the run has no checkpoint, or ``out`` is taken.
    """
    reader, model_config, state = open_run(folder)
    config = validate(state["config"], str(folder))
    card = model_card(
        folder.absolute().name,
        model_config,
        sources=_sources(config),
        metrics=_rounded(summary([r for r in read_metrics(folder / "metrics.jsonl") if r["step"] <= state["step"]])),
        run_config=dump_config(config),
    )
    with fetched(folder / "tokenizer") as tokenizer:
        return export(reader, model_config, out, tokenizer=tokenizer, card=card, **options)


def sample(folder: Path, prompt: str, max_new_tokens: int = 64) -> str:
    """Continue ``prompt`` with the exported model, loaded by transformers as any other program would."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with fetched(folder) as local:
        model = AutoModelForCausalLM.from_pretrained(local, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(local)
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def _sources(config: RunConfig) -> list[str]:
    return [f"{source.path} (weight {source.weight:g})" for source in config.data.train]


def _rounded(values: dict[str, float]) -> dict[str, str]:
    return {name: f"{value:,.6g}" if isinstance(value, float) else f"{value:,}" for name, value in values.items()}
