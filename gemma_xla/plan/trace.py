"""Child process: record the train step of a run on placeholders, and write its graphs for the compiler.

`python -m gemma_xla.plan.trace QUESTION OUT`: a JSON file that says what to record, and the folder to write to.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from gemma_xla.chips import CHIPS
from gemma_xla.config_file import validate
from gemma_xla.interrupts import end_with_parent
from gemma_xla.model.config import GemmaConfig
from gemma_xla.sharding import MeshShape
from gemma_xla.train.build import build_model, trained
from gemma_xla.train.optimizer import MOMENTS, build_optimizer
from gemma_xla.train.step import Batch, make_step
from gemma_xla.xla.placeholders import Graph, PlaceholderBackend

# What `gemma_xla.data.packing.pack` makes.
_BATCH = {
    "input_ids": torch.int32,
    "position_ids": torch.int32,
    "segment_ids": torch.int32,
    "shift_labels": torch.int64,
}


def record(question: dict[str, Any]) -> list[tuple[Graph, int]]:
    """Return a step's graphs and how often each runs: of the first micro-batch, of one in the middle, and of the last
    with the optimizer; with a single micro-batch the last alone.

    Args:
        question: ``config`` (a `RunConfig` as a dict), ``model`` (a `GemmaConfig`), ``mesh`` (a `MeshShape`), ``rows``
            of a micro-batch, ``dtype`` (the compute dtype), ``chip`` (its name in the
            catalogue; null: the graphs of a run on CPUs).
    """
    config, model_config = validate(question["config"], "the plan"), GemmaConfig(**question["model"])
    backend = PlaceholderBackend(MeshShape(**question["mesh"]), CHIPS.get(question["chip"]))
    dtype = getattr(torch, question["dtype"])

    def make(name: str, shape: torch.Size, spec, dtype: torch.dtype) -> torch.Tensor:
        begun[name] = backend.placeholder(shape, dtype, spec, "parameters")
        return begun[name]

    begun: dict[str, torch.Tensor] = {}
    attention = config.model.attention
    if attention == "auto":
        attention = backend.attention(model_config.head_dim, config.data.seq_len)
    model, specs = build_model(model_config, backend, make, attention, config.lora, dtype)
    optimizer = build_optimizer(model, specs, backend, config.train.optimizer)
    backend.seed(config.seed)
    step = make_step(model, specs, optimizer, backend, config.train, dtype)
    batch = _batch(question["rows"], config.data.seq_len)
    parameters = dict(trained(model))
    graphs, totals, gradients = [], None, {}
    for count in _repeats(config.train.grad_accum):
        totals = step.accumulate(batch, totals)
        added = [(gradients[name], p.grad) for name, p in parameters.items()] if gradients else []
        new = [] if gradients else [p.grad for p in parameters.values()]
        graphs.append((backend.capture([totals, *new], added), count))
        # What follows finds it all on the devices.
        totals = backend.placeholder(totals.shape, totals.dtype, (None,), "scalars")
        for name, p in parameters.items():
            p.grad = gradients[name] = backend.placeholder(p.shape, p.grad.dtype, specs[name], "gradients")
    result = step.update(step.accumulate(batch, totals), config.train.optimizer.lr)
    state = [(begun[name], p.detach()) for name, p in parameters.items()]
    for p in parameters.values():
        # The optimizer changes its state in place.
        state += [(optimizer.state[p][key],) * 2 for key in ("step", *MOMENTS)]
    graphs.append((backend.capture([result], state), 1))
    return graphs


def _repeats(grad_accum: int) -> list[int]:
    """How often the graphs before the last one run."""
    return [] if grad_accum == 1 else [1] if grad_accum == 2 else [1, grad_accum - 2]


def _batch(rows: int, seq_len: int) -> Batch:
    return {name: torch.empty(rows, seq_len, dtype=dtype, device="meta") for name, dtype in _BATCH.items()}


def main() -> None:
    """Write each graph as ``0.hlo`` and ``0.json``, ``1.hlo`` and so on; ``count``: how often it runs in a step."""
    end_with_parent(signal.SIGKILL)
    question, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    for number, (graph, count) in enumerate(record(question)):
        (out / f"{number}.hlo").write_bytes(graph.hlo)
        arguments = {n: dataclasses.asdict(argument) for n, argument in graph.arguments.items()}
        description = {"arguments": arguments, "results": graph.results, "aliases": graph.aliases, "count": count}
        (out / f"{number}.json").write_text(json.dumps(description))


if __name__ == "__main__":
    main()
