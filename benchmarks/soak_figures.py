"""What a soak found: how two runs differ, and what one of their processes holds on to."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from soak_run import Sample

from gemma_xla.checkpoint import CheckpointReader, complete, read_state
from gemma_xla.train.metrics import read_metrics

# What must be the same in both runs' records; the rest are times.
RECORDED = ("step", "loss", "eval_loss", "grad_norm", "learning_rate", "tokens")
# Fractions of a process's steps: the thirds after warm-up.
THIRDS = (0.2, 0.45), (0.45, 0.7), (0.7, 1.0)
# Samples in either.
ENOUGH = 10
MEMORY_BOUND = 0.02


@dataclass
class Figures:
    """What a soak found."""

    planned: int = 0
    survived: Counter[str] = field(default_factory=Counter)
    # Steps lost by each interruption.
    lost: list[int] = field(default_factory=list)
    differing: int = 0
    compared: int = 0
    # As a fraction.
    memory: float = 0.0
    handles: int = 0
    threads: int = 0

    def table(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.survived.items())
        most = max(self.lost, default=0)
        rows = {
            "interruptions survived": f"{self.survived.total()} of {self.planned}: {kinds}",
            "steps lost": f"{sum(self.lost)}: those since the last checkpoint, at most {most} at once",
            "bits differing": f"{self.differing:,} of {self.compared:,}",
            "memory growth": f"{self.memory:+.2%} after warm-up",
            "file handles leaked": f"{self.handles}",
            "threads leaked": f"{self.threads}",
        }
        return "\n".join(f"{name:>22}: {value}" for name, value in rows.items())

    def problems(self) -> list[str]:
        """The bounds that do not hold."""
        bounds = {
            "not every interruption was survived": self.survived.total() < self.planned,
            f"{self.differing:,} bits differ": self.differing > 0,
            f"memory grew by more than {MEMORY_BOUND:.0%}": self.memory > MEMORY_BOUND,
            "file handles were leaked": self.handles > 0,
            "threads were leaked": self.threads > 0,
        }
        return [problem for problem, holds in bounds.items() if holds]


def differing_bits(left: Path, right: Path) -> tuple[int, int]:
    """Compare two finished runs; return how many bits differ, of how many."""
    ours, theirs = _contents(left), _contents(right)
    differing = 0
    for name in ours.keys() | theirs.keys():
        a, b = ours.get(name, b""), theirs.get(name, b"")
        shared = min(len(a), len(b))
        differing += (int.from_bytes(a[:shared]) ^ int.from_bytes(b[:shared])).bit_count()
        differing += 8 * (max(len(a), len(b)) - shared)
    return differing, 8 * sum(map(len, ours.values()))


def _contents(folder: Path) -> dict[str, bytes]:
    """Everything that a run's last checkpoint and its records hold, but for times."""
    last = complete(folder / "checkpoints")[-1]
    reader, state = CheckpointReader(last), read_state(last)
    found = {name: reader.read(name).reshape(-1).view(torch.uint8).numpy().tobytes() for name in reader.names()}
    records = [[r.get(name) for name in RECORDED] for r in read_metrics(folder / "metrics.jsonl")]
    rest = {name: state[name] for name in ("step", "tokens", "rng", "data")} | {"records": records}
    return found | {name: json.dumps(value).encode() for name, value in rest.items()}


def growth(samples: list[Sample]) -> tuple[float, int, int] | None:
    """What a process held at its end beyond what it held after warm-up: memory (a fraction), file handles, threads.

    Both the least and the most must have grown: checkpoints and evaluations need theirs for a while, on a busy machine
    for nearly all of a part. And they must have grown twice, from third to third: an allocator that still learns what a
    checkpoint needs, a pool that gets its last thread late, a file that is opened late, stay at that; a leak goes on.
    Of memory, which is never quite still, twice the least of these growths counts. None: there are too few samples to
    tell.
    """
    thirds = [_between(samples, *bounds) for bounds in THIRDS]
    if min(map(len, thirds)) < ENOUGH:
        return None
    held = [[extreme(s.rss for s in third) for third in thirds] for extreme in (min, max)]
    memory = 2 * min(late / early - 1 for either in held for early, late in pairwise(either))
    handles = _grown(*([s.handles for s in third] for third in thirds))
    return memory, handles, _grown(*([s.threads for s in third] for third in thirds))


def _between(samples: list[Sample], low: float, high: float) -> list[Sample]:
    # With the last step come samples of what follows training.
    first, last = samples[0].step, samples[-1].step
    low, high = (first + (last - first) * at for at in (low, high))
    return [sample for sample in samples if low <= sample.step < high]


def _grown(*thirds: list[int]) -> int:
    steps = [min(min(late) - min(early), max(late) - max(early)) for early, late in pairwise(thirds)]
    return sum(steps) if min(steps) > 0 else 0
