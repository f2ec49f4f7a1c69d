"""What a run computes twice, decided by the memory that its devices have."""

from __future__ import annotations

import torch

from gemma_xla.backend import Backend
from gemma_xla.chips import Chip
from gemma_xla.config import RunConfig
from gemma_xla.model.config import GemmaConfig
from gemma_xla.temporaries import Step, choose_remat
from gemma_xla.train.memory import Memory


def with_remat(
    config: RunConfig,
    model: GemmaConfig,
    backend: Backend,
    chip: Chip,
    memory: Memory,
    *,
    rows: int,
    dtype: torch.dtype,
    attention: str,
) -> RunConfig:
    """A run's config with ``train.remat: auto`` resolved.

    Args:
        memory: what each device keeps from step to step.
        rows: of a micro-batch over the whole mesh.
        dtype: the compute dtype.
        attention: a key of `gemma_xla.model.attention.IMPLEMENTATIONS`.
    """
    step = Step(
        train=config.train,
        lora=config.lora,
        model=model,
        mesh=backend.mesh,
        seq_len=config.data.seq_len,
        positions=rows // backend.batch_shards * config.data.seq_len,
        itemsize=dtype.itemsize,
        trained=memory.trained,
        held=memory.total,
        uses_splash=attention not in ("reference", "blocks"),
    )
    return config.model_copy(update={"train": choose_remat(step, chip.hbm_bytes)})
