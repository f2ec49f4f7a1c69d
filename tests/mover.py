"""Continues a run on the devices that its config names and says whether it began with just what was saved.

torch_xla fixes its devices once per process, so tests call this in a process of its own: `python -m tests.mover CONFIG
[OVERRIDE ...]`.
"""

from __future__ import annotations

import json
import sys

import torch

from gemma_xla.checkpoint import CheckpointReader
from gemma_xla.config_file import load_config
from gemma_xla.xla import configure_environment


def main(path: str, overrides: list[str]) -> None:
    config = load_config(path, overrides)
    configure_environment(config.mesh.virtual_devices)
    from gemma_xla.train import Run, Trainer

    with Run(config) as run:
        trainer = Trainer(run)
        result = {"step": trainer.step, "devices": run.backend.mesh.num_devices, "different": None}
        if run.newest:
            reader = CheckpointReader(run.newest.folder)
            tensors = trainer._tensors()
            assert tensors.keys() == set(reader.names())
            result["different"] = [n for n, t in tensors.items() if not torch.equal(whole(run, t), reader.read(n))]
        trainer.fit()
    print(json.dumps(result))


def whole(run, tensor: torch.Tensor) -> torch.Tensor:
    out = torch.full(tensor.shape, torch.nan)
    for index, values in run.backend.pieces(tensor):
        out[index] = values
    return out


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
