"""What a run computes twice, decided by the memory that its devices have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemma_xla.config import RunConfig
from gemma_xla.temporaries import Step, choose_remat

if TYPE_CHECKING:
    from gemma_xla.train.run import Run


def with_remat(run: Run) -> RunConfig:
    """The config of a run whose devices are known, with ``train.remat: auto`` resolved."""
    config = run.config
    step = Step(
        train=config.train,
        lora=config.lora,
        model=run.model_config,
        mesh=run.backend.mesh,
        seq_len=config.data.seq_len,
        positions=run.micro_batch_rows // run.backend.batch_shards * config.data.seq_len,
        itemsize=run.compute_dtype.itemsize,
        trained=run.memory.trained,
        held=run.memory.total,
        uses_splash=run.attention != "reference",
    )
    return config.model_copy(update={"train": choose_remat(step, run.chip.hbm_bytes)})
