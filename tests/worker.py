"""Runs training steps on synthetic batches, on any mesh or without torch_xla, and reports what happened as JSON.

torch_xla fixes its devices once per process, so tests call this in a process of its own: `run_in_process(spec)`.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from typing import Any

import torch

from gemma_xla.config import LoraSection, MeshSection, OptimizerSection, TrainSection
from gemma_xla.hf import HfReader
from gemma_xla.model.config import GemmaConfig, preset
from gemma_xla.train.build import adapted, build_model, initial, stored
from gemma_xla.train.optimizer import MOMENTS, build_optimizer
from gemma_xla.train.parallelize import parallelize
from gemma_xla.train.step import Batch, TrainStep, summed_loss
from gemma_xla.xla import open_backend

DEFAULTS: dict[str, Any] = {
    "devices": 0,
    "mesh": [1, 1, 1],
    "layers": "loop",
    "remat": "none",
    "keep": {},
    "grad_accum": 1,
    "steps": 4,
    "precision": "default",
    "int8_rounding": "nearest",
    "reduce_dtype": "auto",
    "clip_norm": 1.0,
    "rates": None,
    "dtype": "float32",
    "model": {"initializer_range": 0.1},
    "sizes": None,
    # A Hugging Face folder to start from, and the most elements of its tensors that the host makes float32.
    "from": None,
    "wide": None,
    # The config's section, to train adapters beside those weights.
    "lora": None,
}


def batch(step: int, config: GemmaConfig, rows: int = 8, length: int = 32) -> Batch:
    """Packed rows of two documents and some padding, of which some rows have much."""
    generator = torch.Generator().manual_seed(step)
    # Not 0: transformers gives padding no gradient.
    tokens = torch.randint(1, config.vocab_size, (rows, length + 1), generator=generator)
    segment_ids = torch.ones(rows, length, dtype=torch.int32)
    position_ids = torch.arange(length, dtype=torch.int32).repeat(rows, 1)
    segment_ids[:, 10:] = 2
    position_ids[:, 10:] -= 10
    padded = torch.arange(length) >= torch.linspace(length - 1, 12, rows)[:, None]
    segment_ids[padded], position_ids[padded] = 0, 0
    return {
        "input_ids": tokens[:, :-1].to(torch.int32),
        "position_ids": position_ids,
        "segment_ids": segment_ids,
        "shift_labels": torch.where(padded, -100, tokens[:, 1:]),
    }


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """Take ``spec["steps"]`` steps; see `DEFAULTS` for what a spec may say."""
    spec = DEFAULTS | spec
    config = preset("gemma-test").replace(**spec["model"])
    data, fsdp, tensor = spec["mesh"]
    section = MeshSection(data=data, fsdp=fsdp, tensor=tensor, virtual_devices=spec["devices"] or None)
    backend = open_backend(section, use_xla=spec["devices"] > 0, device=torch.device("cpu"))
    if spec["wide"] is not None:
        sys.modules[type(backend).__module__].WIDE = spec["wide"]
    make = stored(HfReader(spec["from"]), backend) if spec["from"] else initial(config, backend, 0)
    lora = LoraSection(**spec["lora"]) if spec["lora"] else None
    if lora:
        make = adapted(HfReader(spec["from"]), backend, 0)
    model, specs = build_model(config, backend, make, backend.attention(config.head_dim, 32), lora)
    train = {name: spec[name] for name in ("layers", "remat", "keep", "precision", "int8_rounding", "reduce_dtype")}
    train = TrainSection(steps=1, batch_size=1, **train)
    optimizer = build_optimizer(model, specs, backend, OptimizerSection())
    parallelize(model, specs, backend, train, getattr(torch, spec["dtype"]))
    step = TrainStep(model, optimizer, backend, clip_norm=spec["clip_norm"], loss_chunk=16)
    backend.flush()
    start = {name: _digest(_whole(backend, parameter)) for name, parameter in model.named_parameters()}
    results, compiled = [], [backend.compilations()]
    for number in range(spec["steps"]):
        rows, length = (spec["sizes"] or [[8, 32]] * spec["steps"])[number]
        whole = batch(number, config, rows, length)
        parts = {key: value.chunk(spec["grad_accum"]) for key, value in whole.items()}
        micro_batches = [{key: part[i] for key, part in parts.items()} for i in range(spec["grad_accum"])]
        rate = spec["rates"][number] if spec["rates"] else 1e-2 * (number + 1)
        results.append(step(micro_batches, rate).tolist())
        compiled.append(backend.compilations())
    summed_loss(model, batch(0, config), backend, 16)[0].backward()
    backend.flush()
    weight = model.model.layers[0].mlp.gate_proj
    weight = weight.lora_B.weight if lora else weight.weight
    moments = [optimizer.state[weight][name] for name in MOMENTS]
    gradient = _whole(backend, weight.grad)
    return {
        "start": start,
        "losses": [r[0] for r in results],
        "grad_norms": [r[1] for r in results],
        "tokens": [r[2] for r in results],
        "compilations": [b - a for a, b in zip(compiled[:-1], compiled[1:], strict=True)],
        "parts": [[list(values.shape) for _, values in backend.pieces(t)] for t in (weight, *moments, weight.grad)],
        "rounded": torch.equal(gradient, gradient.bfloat16().float()),
        "weights": {n: _whole(backend, p).norm().item() for n, p in model.named_parameters()},
    }


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def _whole(backend: Any, tensor: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(tensor.shape)
    for index, values in backend.pieces(tensor):
        out[index] = values
    return out


def run_in_process(spec: dict[str, Any]) -> dict[str, Any]:
    """`run` in a new process."""
    command = [sys.executable, "-m", "tests.worker", json.dumps(spec)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode < 0:
        # Killed by a signal, as torch_xla's runtime is now and then on a busy machine: no number came out, try again.
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
