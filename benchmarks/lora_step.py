"""What a LoRA step costs: this project beside `peft` on `transformers`, from equal weights, on equal batches.

    python benchmarks/lora_step.py
    python benchmarks/lora_step.py --rounds 20 --only torch --loss-chunk 128 --json result.json

The model and the batches of train_step.py: 62M frozen parameters, 4 rows of 512 tokens without padding, float32; rank
16 beside all seven matrices of a layer, AdamW, clipping. Each contender lives in a process of its own, and they step in
turn. Memory is the most that a process has held, less what it held before the model was made (imports, XLA's client);
what XLA's compiler needs counts. Ratios are taken within a round. Exits with 1 when a loss differs from that of `peft`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

import psutil
import torch
from train_step import (
    BASELINE,
    CONFIG,
    LENGTH,
    OPTIMIZER,
    ROWS,
    WARMUP,
    Step,
    Turn,
    equal_losses,
    make_batch,
    report,
    summarize,
)

from gemma_xla.config import LoraSection, MeshSection, TrainSection
from gemma_xla.model.attention import IMPLEMENTATIONS
from gemma_xla.model.gemma import init_parameter
from gemma_xla.model.lora import init_adapter, is_adapter
from gemma_xla.train.build import Make, build_model, initial
from gemma_xla.train.optimizer import build_optimizer
from gemma_xla.train.parallelize import parallelize
from gemma_xla.train.step import Batch, TrainStep
from gemma_xla.xla import Backend, open_backend

LORA = LoraSection(rank=16, alpha=32)
LOSS_CHUNK = TrainSection.model_fields["loss_chunk"].default

# Makes the model, once everything that it needs is imported.
Build = Callable[[], Step]


def adapted(backend: Backend) -> Make:
    """Random weights and new adapters."""
    plain = initial(CONFIG, backend, 0)

    def make(name, shape, spec, dtype):
        if not is_adapter(name):
            return plain(name, shape, spec, dtype)
        values = torch.empty(shape)
        init_adapter(name, values, seed=0)
        return backend.place(values, spec)

    return make


def ours(attention: str | None, loss_chunk: int, *, xla: bool) -> Build:
    backend = open_backend(MeshSection(virtual_devices=1 if xla else None), use_xla=xla, device=torch.device("cpu"))
    attention = attention or backend.attention(CONFIG.head_dim, LENGTH)

    def build() -> Step:
        model, specs = build_model(CONFIG, backend, adapted(backend), attention, LORA)
        optimizer = build_optimizer(model, specs, backend, OPTIMIZER)
        parallelize(model, specs, backend, TrainSection(steps=1, batch_size=ROWS), torch.float32)
        step = TrainStep(model, optimizer, backend, clip_norm=OPTIMIZER.clip_norm, loss_chunk=loss_chunk)
        backend.flush()
        return lambda batch: step([batch], OPTIMIZER.lr)[0].item()

    return build


def theirs(*_settings) -> Build:
    import peft
    from transformers import GemmaConfig, GemmaForCausalLM

    config = GemmaConfig(**asdict(CONFIG), attn_implementation="sdpa")
    settings = peft.LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, target_modules=list(LORA.target_modules))

    def build() -> Step:
        model = peft.get_peft_model(GemmaForCausalLM(config), settings).train()
        for name, parameter in model.named_parameters():
            name = name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".default", "")
            if is_adapter(name):
                init_adapter(name, parameter, seed=0)
            else:
                init_parameter(name, parameter, CONFIG, seed=0)
        trained = [p for p in model.parameters() if p.requires_grad]
        betas = OPTIMIZER.beta1, OPTIMIZER.beta2
        options = {"betas": betas, "eps": OPTIMIZER.eps, "weight_decay": OPTIMIZER.weight_decay}
        optimizer = torch.optim.AdamW(trained, lr=OPTIMIZER.lr, **options)

        def step(batch: Batch) -> float:
            input_ids = batch["input_ids"].long()
            loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, OPTIMIZER.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()

        return step

    return build


CONTENDERS: dict[str, Callable[..., Build]] = {
    BASELINE: theirs,
    "torch": partial(ours, xla=False),
    "xla": partial(ours, xla=True),
}


class Contender:
    """A process of its own that takes one step after the other."""

    def __init__(self, name: str, *settings) -> None:
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, context, initializer=start, initargs=(name, *settings))

    def turn(self, number: int) -> Turn:
        return self._pool.submit(take_step, number).result()


def start(name: str, *settings) -> None:
    """In the contender's process: make the model."""
    global held, step
    build = CONTENDERS[name](*settings)
    held = psutil.Process().memory_info().rss
    step = build()


def take_step(number: int) -> Turn:
    """In the contender's process: take a step on the batch of this number."""
    batch = make_batch(number)
    cpu, wall = time.process_time(), time.perf_counter()
    loss = step(batch)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
    return Turn(loss, cpu, wall, (peak - held) / 2**30)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10, help="turns of each contender that count")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="besides transformers")
    parser.add_argument("--attention", choices=IMPLEMENTATIONS, help="ours; default: what suits the backend")
    parser.add_argument("--loss-chunk", type=int, default=LOSS_CHUNK, help="ours: positions whose logits exist at once")
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    args = parser.parse_args()

    # Threads that wait by spinning would be charged for waiting; torch_xla announces a default where nothing is said.
    os.environ |= {"OMP_NUM_THREADS": str(os.cpu_count()), "OMP_WAIT_POLICY": "PASSIVE", "PJRT_DEVICE": "CPU"}
    names = [name for name in CONTENDERS if name == BASELINE or name in args.only]
    contenders = {name: Contender(name, args.attention, args.loss_chunk) for name in names}
    turns: dict[str, list[Turn]] = {name: [] for name in names}
    for number in range(WARMUP + args.rounds):
        for name, contender in contenders.items():
            turns[name].append(contender.turn(number))
    summary = summarize(turns)
    report(summary)
    for name in names[1:]:
        print(
            f"\n{name}: {summary[name]['peak_gb'] / summary[BASELINE]['peak_gb']:.2f} times the memory of peft", end=""
        )
    equal = equal_losses(summary)
    print(f"\nlosses equal to those of peft: {'yes' if equal else 'NO'}")
    if args.json:
        args.json.write_text(json.dumps(summary, indent=2) + "\n")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
