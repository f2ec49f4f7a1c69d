"""Adapters that change much, and runs that trained them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import torch

from gemma_xla import hf
from gemma_xla.backend import Backend
from gemma_xla.checkpoint import Saver
from gemma_xla.config import LoraSection, RunConfig
from gemma_xla.weights import fingerprint


def random_adapter(model: torch.nn.Module, lora: LoraSection, seed: int = 0) -> dict[str, torch.Tensor]:
    """An adapter for ``model`` that changes much."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in lora.target_modules:
            tensors[f"{name}.lora_A.weight"] = torch.randn(lora.rank, module.in_features, generator=draw) * 0.2
            tensors[f"{name}.lora_B.weight"] = torch.randn(module.out_features, lora.rank, generator=draw) * 0.2
            if lora.use_dora:
                tensors[f"{name}.lora_magnitude_vector"] = torch.rand(module.out_features, generator=draw) + 0.5
    return tensors


def make_lora_run(config: RunConfig, tokenizer: Path, losses: dict[int, float]) -> Path:
    """The folder of a run that kept an adapter of each of these steps, and its held-out loss."""
    folder, base = Path(config.output_dir), Path(config.model.init_from)
    shutil.copytree(tokenizer, folder / "tokenizer")
    shape, reader = hf.read_config(base), hf.HfReader(base)
    model = hf.load_model(base)
    saver = Saver(folder / "checkpoints", Backend(torch.device("cpu")), keep_last=len(losses))
    state = {"config": config.model_dump(), "model": dataclasses.asdict(shape), "base": fingerprint(reader)}
    for step in losses:
        adapter = random_adapter(model, config.lora, seed=step)
        saver.save(step, {f"model/{name}": tensor for name, tensor in adapter.items()}, state)
    saver.close()
    records = [{"step": step, "eval_loss": loss} for step, loss in losses.items()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder
