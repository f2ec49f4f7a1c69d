"""What a run keeps on each device from its first step to its last."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gemma_xla.config import LoraSection
from gemma_xla.model.config import GemmaConfig
from gemma_xla.sharding import MeshShape
from gemma_xla.train.build import empty_model, plan_shards, stored_dtype

_MOMENTS = 2


@dataclass(frozen=True)
class Memory:
    """Bytes on the device that holds most. Activations come on top."""

    frozen: int
    # Float32, as are their gradients and Adam's two moments.
    trained: int
    frozen_dtype: torch.dtype

    @property
    def total(self) -> int:
        return self.frozen + self.trained * (2 + _MOMENTS)

    def __str__(self) -> str:
        parts = [f"{size(self.frozen)} of frozen weights ({str(self.frozen_dtype).removeprefix('torch.')})"]
        parts = parts if self.frozen else []
        parts += [f"{size(self.trained)} of trained weights", f"{size(self.trained)} of gradients"]
        parts.append(f"{size(self.trained * _MOMENTS)} of Adam's moments")
        return f"{size(self.total)}: {', '.join(parts)}; activations come on top"


def memory(
    config: GemmaConfig, mesh: MeshShape, lora: LoraSection | None = None, frozen_dtype: torch.dtype = torch.float32
) -> Memory:
    """Add up what weights, gradients and optimizer take on each device.

    Raises:
        UserError: the mesh does not suit the model.
    """
    specs = plan_shards(config, mesh, lora)
    held = {True: 0, False: 0}
    for name, parameter in empty_model(config, "sdpa", lora).named_parameters():
        share = parameter.numel() // math.prod(mesh.ways(entry) for entry in specs[name])
        held[parameter.requires_grad] += share * stored_dtype(parameter, frozen_dtype).itemsize
    return Memory(frozen=held[False], trained=held[True], frozen_dtype=frozen_dtype)


def size(count: int) -> str:
    """Bytes in the unit that suits them."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:,.3g} {unit}"
    return f"{count / 1e3:,.3g} kB"
