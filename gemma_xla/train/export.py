"""From a run's checkpoint to what other programs load: a model or, of a run with LoRA, an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gemma_xla import hf
from gemma_xla.checkpoint import complete
from gemma_xla.checkpoint.folder import step_of
from gemma_xla.config import RunConfig
from gemma_xla.config_file import dump_config
from gemma_xla.errors import UserError
from gemma_xla.train.metrics import read_metrics, summary
from gemma_xla.weights import Checkpoint, base_name, is_run, open_checkpoint, open_weights


def export_run(
    folder: Path,
    out: Path,
    *,
    checkpoint: str = "last",
    merge: bool = False,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    name: str | None = None,
) -> Path:
    """Write a checkpoint of the run in ``folder`` as a Hugging Face model folder or a peft adapter folder; return it.

    Args:
        folder: that of a run or, with ``merge``, of a peft adapter.
        checkpoint: "last", "best" (the lowest held-out loss) or a step.
        merge: with LoRA, write the whole model that has the adapter merged into its weights.
        dtype: what weights are stored as; None: float32 for an adapter, bfloat16 for a model.
        max_shard_size: the largest weight file of a model.
        overwrite: replace what is there, if it is of the same kind.
        name: what the model card calls it; None: the name of the run's folder.

    Raises:
        UserError: there is no such checkpoint, nothing to merge, or ``out`` is taken.
    """
    if not is_run(folder) and hf.is_adapter_folder(folder):
        if not merge:
            raise UserError(f"{folder}: it is an adapter already; give --merge for the model that has it merged in")
        if checkpoint != "last":
            raise UserError(f"--checkpoint is {checkpoint!r}, but {folder} is an adapter and no run; leave it out")
        found, card = open_weights(folder), None
    else:
        opened = open_checkpoint(folder, _step(folder, checkpoint))
        lora = opened.config.lora
        if merge and lora is None:
            raise UserError(f"{folder}: --merge is for runs with LoRA, and this one trained all weights; leave it out")
        if lora is not None and not merge:
            return _export_adapter(opened, out, name, dtype=dtype or "float32", overwrite=overwrite)
        found, card = opened.weights(), _card(opened, name)
    options = {"dtype": dtype or "bfloat16", "max_shard_size": max_shard_size, "overwrite": overwrite}
    given = {"tokenizer": found.tokenizer, "card": card, "end_tokens": found.end_tokens}
    return hf.export(found.reader, found.config, out, **given, **options)


def best_step(folder: Path) -> tuple[int, float]:
    """Of the checkpoints that a run has kept, that with the lowest held-out loss: its step and that loss.

    Raises:
        UserError: none was evaluated.
    """
    losses = {r["step"]: r["eval_loss"] for r in read_metrics(folder / "metrics.jsonl") if "eval_loss" in r}
    kept = [step for step in map(step_of, complete(folder / "checkpoints")) if step in losses]
    if not kept:
        raise UserError(f"{folder}: none of its checkpoints was evaluated, so none is the best; take the last one")
    step = min(kept, key=losses.__getitem__)
    return step, losses[step]


def rounded(values: dict[str, float]) -> dict[str, str]:
    return {name: f"{value:,.6g}" if isinstance(value, float) else f"{value:,}" for name, value in values.items()}


def _step(folder: Path, checkpoint: str) -> int | None:
    if checkpoint == "last":
        return None
    if checkpoint == "best":
        return best_step(folder)[0]
    if not checkpoint.isdecimal():
        raise UserError(f"--checkpoint is {checkpoint!r}; write last, best or a step, such as 100")
    return int(checkpoint)


def _export_adapter(checkpoint: Checkpoint, out: Path, name: str | None, **options: Any) -> Path:
    base, lora = base_name(checkpoint.config.model.init_from, lora=True), checkpoint.config.lora
    card = _card(checkpoint, name, lora=lora)
    return hf.export_adapter(
        checkpoint.reader,
        lora,
        out,
        base_model=base,
        tokenizer=checkpoint.run / "tokenizer",
        card=card,
        end_tokens=checkpoint.end_tokens,
        **options,
    )


def _card(checkpoint: Checkpoint, name: str | None, **options: Any) -> str:
    folder, config = checkpoint.run, checkpoint.config
    records = [r for r in read_metrics(folder / "metrics.jsonl") if r["step"] <= checkpoint.step]
    start = config.model.init_from
    return hf.model_card(
        name or folder.absolute().name,
        checkpoint.architecture,
        sources=_sources(config),
        metrics=rounded(summary(records)),
        run_config=dump_config(config),
        base_model=base_name(start, lora=config.lora is not None) if start else None,
        **options,
    )


def _sources(config: RunConfig) -> list[str]:
    return [f"{source.path} (weight {source.weight:g})" for source in config.data.train]
