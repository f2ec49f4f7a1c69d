"""The end of a run: curves, the folders for other programs, a sample, and where everything is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gemma_xla import hf
from gemma_xla.storage import fetched
from gemma_xla.train.export import best_step, export_run, rounded
from gemma_xla.train.metrics import plot, read_metrics, summary
from gemma_xla.train.run import Run
from gemma_xla.train.verify import load_with_peft, verify
from gemma_xla.weights import open_checkpoint, resolve_base


def finish(run: Run) -> None:
    """Draw, export, compare, sample, print what the run made, and upload it. Call it on the first host.

    Raises:
        UserError: something could not be written, or not be uploaded (last of all).
    """
    with run.watchdog.during("exporting"):
        _finish(run)


def _finish(run: Run) -> None:
    folder, section = run.folder, run.config.export
    records = read_metrics(folder.metrics)
    plot(records, folder.work / "curves.png", folder.path.name)
    folder.publish()
    made = {
        "config": folder.config,
        "metrics": folder.metrics,
        "samples": folder.samples,
        "TensorBoard": folder.path / "tensorboard",
        "curves": folder.path / "curves.png",
        "tokenizer": folder.path / "tokenizer",
        "checkpoints": folder.checkpoints,
    }
    if section.at_end:
        made |= _export(run)
    run.say(f"\n{_table(rounded(summary(records)))}\n\n{_table({k: v for k, v in made.items() if v.exists()})}")
    if section.at_end and section.push_to_hub:
        uploaded = folder.adapter if run.config.lora else folder.export
        run.say(_table({"uploaded": hf.push(uploaded, section.push_to_hub)}))


def sample(base: Path, prompt: str, adapter: Path | None = None, max_new_tokens: int = 64) -> str:
    """Continue ``prompt`` with an exported model, loaded by transformers (and peft) as any other program would."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with fetched(adapter or base) as local:
        tokenizer = AutoTokenizer.from_pretrained(local)
        if adapter is None:
            model = AutoModelForCausalLM.from_pretrained(local, dtype=torch.float32)
        else:
            model = load_with_peft(base, local)
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def _table(rows: dict[str, Any]) -> str:
    width = max((12, *map(len, rows)))
    return "\n".join(f"{name:>{width}}: {value}" for name, value in rows.items())


def _export(run: Run) -> dict[str, Path]:
    """Write the model or the adapter, compare it and let it speak; return what was made."""
    config, folder, section = run.config, run.folder, run.config.export
    step = None
    if config.checkpoint.keep_best and run.corpus.has_eval:
        step, loss = best_step(folder.path)
        before = [r["eval_loss"] for r in read_metrics(folder.metrics) if r["step"] == 0 and "eval_loss" in r]
        worse = " (no better than before training)" if before and loss >= before[0] else ""
        run.say(f"\nExporting step {step}, which has the lowest held-out loss: {loss:.4f}{worse}")
    which = {"checkpoint": "last" if step is None else str(step), "overwrite": True, "name": section.push_to_hub}
    base, adapter = folder.export, None
    made = {}
    if config.lora:
        base = resolve_base(config.model.init_from, lora=True)
        adapter = export_run(folder.path, folder.adapter, **which)
        made["adapter"] = folder.adapter
    if config.lora is None or section.merged:
        merge = config.lora is not None
        options = {"dtype": section.dtype, "max_shard_size": section.max_shard_size}
        made["model"] = export_run(folder.path, folder.export, merge=merge, **which, **options)
    if adapter and section.verify:
        run.say("\n" + verify(run, open_checkpoint(folder.path, step, run.say).weights(), base, adapter))
    if config.log.sample_prompt is not None:
        run.say("\n" + sample(base, config.log.sample_prompt, adapter))
    return made
