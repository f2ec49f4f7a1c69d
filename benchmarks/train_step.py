"""What a training step costs: this project beside `transformers`, from equal weights, on equal batches.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --rounds 20 --only xla --json result.json

A 62M-parameter Gemma, 4 rows of 512 tokens, float32, AdamW, clipping. Each contender lives in a process of its own and
they step in turn, one at a time, so that whatever slows the machine slows all alike. What counts are CPU-seconds, user
and system, of all threads: on a shared machine they are steadier than the wall clock, which is shown too. Ratios are
taken within a round. Exits with 1 when a loss differs from that of `transformers`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from gemma_xla.config import MeshSection, OptimizerSection, TrainSection
from gemma_xla.config_data import DataSection
from gemma_xla.model.config import preset
from gemma_xla.model.gemma import init_parameter
from gemma_xla.train.build import build_model, initial
from gemma_xla.train.optimizer import build_optimizer
from gemma_xla.train.parallelize import parallelize
from gemma_xla.train.step import Batch, TrainStep
from gemma_xla.xla import open_backend

CONFIG = preset("gemma-small")
ROWS, LENGTH = 4, 512
OPTIMIZER = OptimizerSection()
LOSS_CHUNK = TrainSection.model_fields["loss_chunk"].default
# Steps that compile; they are not counted.
WARMUP = 3
# Losses compared, and the largest relative difference at step 1 and later.
COMPARED, TOLERANCES = 10, (1e-5, 1e-3)
BASELINE = "transformers"
# Batches made by the input pipeline in one turn.
INPUT_BATCHES = 50

Step = Callable[[Batch], float]


@dataclass(frozen=True)
class Turn:
    """One step of one contender: its loss, and what it cost."""

    loss: float
    cpu_seconds: float
    seconds: float
    peak_gb: float


def make_batch(number: int) -> Batch:
    """Full rows of one document each; frequent and rare tokens (Zipf's law), so that there is something to learn."""
    generator = torch.Generator().manual_seed(number)
    first = CONFIG.bos_token_id + 1
    frequency = 1.0 / torch.arange(1, CONFIG.vocab_size - first + 1)
    tokens = first + torch.multinomial(frequency, ROWS * LENGTH, True, generator=generator).view(ROWS, LENGTH)
    return {
        "input_ids": tokens.int(),
        "position_ids": torch.arange(LENGTH, dtype=torch.int32).repeat(ROWS, 1),
        "segment_ids": torch.ones(ROWS, LENGTH, dtype=torch.int32),
        "shift_labels": torch.cat((tokens[:, 1:], torch.full((ROWS, 1), -100)), dim=1),
    }


def ours(devices: int, *, xla: bool, compiled: bool = False) -> Step:
    section = MeshSection(virtual_devices=devices if xla else None)
    backend = open_backend(section, use_xla=xla, device=torch.device("cpu"))
    model, specs = build_model(CONFIG, backend, initial(CONFIG, backend, 0), backend.attention(CONFIG.head_dim, LENGTH))
    optimizer = build_optimizer(model, specs, backend, OPTIMIZER)
    parallelize(model, specs, backend, TrainSection(steps=1, batch_size=ROWS), torch.float32)
    module = torch.compile(model) if compiled else model
    step = TrainStep(module, optimizer, backend, clip_norm=OPTIMIZER.clip_norm, loss_chunk=LOSS_CHUNK)
    backend.flush()
    return lambda batch: step([batch], OPTIMIZER.lr)[0].item()


def theirs(devices: int, *, compiled: bool = False) -> Step:
    from transformers import GemmaConfig, GemmaForCausalLM

    model = GemmaForCausalLM(GemmaConfig(**asdict(CONFIG), attn_implementation="sdpa")).train()
    for name, parameter in model.named_parameters():
        init_parameter(name, parameter, CONFIG, seed=0)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": OPTIMIZER.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=OPTIMIZER.lr,
        betas=(OPTIMIZER.beta1, OPTIMIZER.beta2),
        eps=OPTIMIZER.eps,
    )
    forward = torch.compile(model) if compiled else model

    def step(batch: Batch) -> float:
        input_ids = batch["input_ids"].long()
        loss = forward(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def input_pipeline(devices: int) -> Step:
    """Tokenizes and packs the text of Python's standard library; its "loss" is the share of padding: 0."""
    from gemma_xla.data.documents import Corpus
    from gemma_xla.data.loader import TrainLoader
    from gemma_xla.data.tokenizer import train_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        corpus = Corpus(DataSection(train=[{"path": "{stdlib}/*.py"}], seq_len=LENGTH), seed=0)
        tokenizer = train_tokenizer(corpus.texts(), 4096, Path(folder) / "tokenizer")
    loader = TrainLoader(corpus, tokenizer, num_rows=ROWS, rows=range(ROWS))

    def step(_: Batch) -> float:
        for _ in range(INPUT_BATCHES):
            next(loader)
        return loader.stats()["padding"]

    return step


CONTENDERS: dict[str, Callable[[int], Step]] = {
    BASELINE: theirs,
    "transformers.compile": partial(theirs, compiled=True),
    "xla": partial(ours, xla=True),
    "torch": partial(ours, xla=False),
    "torch.compile": partial(ours, xla=False, compiled=True),
}
INPUT = "input"


def work(name: str, devices: int, pipe: Connection) -> None:
    """A contender's process: take the steps whose numbers come through ``pipe``."""
    step = {**CONTENDERS, INPUT: input_pipeline}[name](devices)
    while (number := pipe.recv()) is not None:
        batch = make_batch(number)
        cpu, wall = time.process_time(), time.perf_counter()
        loss = step(batch)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        pipe.send(Turn(loss, cpu, wall, peak))


def take_turns(names: list[str], steps: int, devices: int) -> dict[str, list[Turn]]:
    """Step through all contenders, ``steps`` times; return each one's turns."""
    os.environ["OMP_NUM_THREADS"] = str(os.cpu_count())
    # Threads that wait by spinning would be charged for waiting.
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    # torch_xla announces a default where nothing is said.
    os.environ["PJRT_DEVICE"] = "CPU"
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name in names:
        pipes[name], far_end = context.Pipe()
        processes.append(context.Process(target=work, args=(name, devices, far_end), daemon=True))
        processes[-1].start()
        # A process that dies then ends its pipe, and the parent does not wait for ever.
        far_end.close()
    turns: dict[str, list[Turn]] = {name: [] for name in names}
    for number in range(steps):
        for name, pipe in pipes.items():
            pipe.send(number)
            turns[name].append(pipe.recv())
            print(f"\rstep {number + 1} of {steps}: {name:24}", end="", file=sys.stderr, flush=True)
    for pipe in pipes.values():
        pipe.send(None)
    for process in processes:
        process.join()
    print("\r", " " * 60, end="\r", file=sys.stderr)
    return turns


def summarize(turns: dict[str, list[Turn]]) -> dict[str, dict]:
    """Medians, and how many times the baseline's speed: median, smallest and largest of all rounds."""
    summary = {}
    for name, own in turns.items():
        counted = list(zip(own[WARMUP:], turns[BASELINE][WARMUP:], strict=True))
        ratios = sorted(base.cpu_seconds / turn.cpu_seconds for turn, base in counted)
        summary[name] = {
            "cpu_seconds": statistics.median(turn.cpu_seconds for turn, _ in counted),
            "seconds": statistics.median(turn.seconds for turn, _ in counted),
            "speed": [statistics.median(ratios), ratios[0], ratios[-1]],
            "wall_speed": statistics.median(base.seconds / turn.seconds for turn, base in counted),
            "peak_gb": own[-1].peak_gb,
            "losses": [turn.loss for turn in own[:COMPARED]],
            "differences": [abs(a.loss / b.loss - 1) for a, b in zip(own, turns[BASELINE], strict=True)][:COMPARED],
        }
    return summary


def report(summary: dict[str, dict]) -> None:
    print(f"{'':22}{'CPU-s':>8}{'wall s':>8}   speed per CPU-s (range){'wall':>8}{'peak GB':>9}{'loss diff':>11}")
    for name, row in summary.items():
        median, low, high = row["speed"]
        ratios = f"{median:.2f} ({low:.2f} to {high:.2f})"
        print(
            f"{name:22}{row['cpu_seconds']:8.2f}{row['seconds']:8.2f}   {ratios:23}{row['wall_speed']:8.2f}"
            f"{row['peak_gb']:9.2f}{max(row['differences']):11.1e}"
        )
    print("\nloss of step" + "".join(f"{name:>22}" for name in summary))
    for number, losses in enumerate(zip(*(row["losses"] for row in summary.values()), strict=True), start=1):
        print(f"{number:12}" + "".join(f"{loss:22.6f}" for loss in losses), flush=True)


def equal_losses(summary: dict[str, dict]) -> bool:
    at_first, later = TOLERANCES
    rows = [row["differences"] for row in summary.values()]
    return all(first <= at_first and all(other <= later for other in others) for first, *others in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10, help="turns of each contender that count")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="besides transformers")
    parser.add_argument("--devices", type=int, default=1, help="virtual devices of the contender 'xla'")
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    args = parser.parse_args()

    names = [name for name in CONTENDERS if name == BASELINE or name in args.only]
    summary = summarize(take_turns(names, WARMUP + args.rounds, args.devices))
    report(summary)
    fastest = ROWS * LENGTH / min(row["seconds"] for row in summary.values())
    made = take_turns([INPUT], 3, args.devices)[INPUT]
    inputs = INPUT_BATCHES * ROWS * LENGTH / statistics.median(turn.seconds for turn in made[1:])
    print(f"\ninput pipeline, one thread: {inputs:,.0f} tokens/s; the fastest step takes {fastest:,.0f}")
    equal = equal_losses(summary)
    print(f"losses equal to those of {BASELINE}: {'yes' if equal else 'NO'}")
    if args.json:
        args.json.write_text(json.dumps({"steps": summary, "input_tokens_per_second": inputs}, indent=2) + "\n")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
