"""A config made concrete on hardware that is not there."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from gemma_xla.config import RunConfig
from gemma_xla.errors import UserError
from gemma_xla.flops import FlopCounter
from gemma_xla.model.config import PRESETS, GemmaConfig, preset, splash_takes
from gemma_xla.plan.slices import Hardware
from gemma_xla.storage import location
from gemma_xla.temporaries import Step, choose_remat

if TYPE_CHECKING:
    import torch

    from gemma_xla.train.memory import Memory

# Imports that load PyTorch, which takes seconds, are left to what needs them: a plan that is known needs none.


@dataclass(frozen=True)
class Setup:
    """What there is to plan.

    Attributes:
        config: the run's.
        hardware: where it is to run.
        model: the architecture.
        flops: of one sequence.
        notes: what was taken for granted.
    """

    config: RunConfig
    hardware: Hardware
    model: GemmaConfig
    flops: FlopCounter
    notes: tuple[str, ...] = ()

    @property
    def dtype_name(self) -> str:
        """The compute dtype."""
        name = self.config.train.compute_dtype
        return "bfloat16" if name == "auto" else name

    @property
    def compute_dtype(self) -> torch.dtype:
        import torch

        return getattr(torch, self.dtype_name)

    @property
    def micro_batch_rows(self) -> int:
        """Sequences per micro-batch in one slice."""
        return self.config.train.micro_batch_rows(self.hardware.mesh.batch_shards) // self.hardware.count

    @property
    def rows(self) -> int:
        """Sequences per step on all chips together."""
        return self.micro_batch_rows * self.hardware.count * self.config.train.grad_accum

    @property
    def uses_splash(self) -> bool:
        """Whether attention is the kernel that keeps no scores."""
        return self.config.model.attention == "auto" and splash_takes(self.model.head_dim, self.flops.seq_len)

    @cached_property
    def memory(self) -> Memory:
        """What a chip keeps from step to step."""
        from gemma_xla.train.memory import memory

        return memory(self.model, self.hardware.slice_mesh, self.config.lora, self.compute_dtype)

    @cached_property
    def step(self) -> Step:
        """What decides how much memory a step takes."""
        return Step(
            train=self.config.train,
            lora=self.config.lora,
            model=self.model,
            mesh=self.hardware.slice_mesh,
            seq_len=self.flops.seq_len,
            positions=self.micro_batch_rows // self.hardware.slice_mesh.batch_shards * self.flops.seq_len,
            itemsize=self.compute_dtype.itemsize,
            trained=self.memory.trained,
            held=self.memory.total,
            uses_splash=self.uses_splash,
        )

    def resolved(self) -> Setup:
        """The same with ``train.remat`` decided."""
        if self.config.train.remat != "auto":
            return self
        train = choose_remat(self.step, self.hardware.chip.hbm_bytes)
        resolved = dataclasses.replace(self, config=self.config.model_copy(update={"train": train}))
        # It takes long to add up, and stays.
        vars(resolved)["memory"] = self.memory
        return resolved


def prepare(config: RunConfig, hardware: Hardware) -> Setup:
    """
    Raises:
        UserError: the architecture is not to be found, or the rows do not suit it or the hardware.
    """
    model, notes = _architecture(config)
    flops = FlopCounter.of_run(model, config.data.seq_len, config.lora)
    if given := os.environ.get("LIBTPU_INIT_ARGS"):
        notes += (f"the TPU compiler was told what LIBTPU_INIT_ARGS says, as a run will be: {given}",)
    setup = Setup(config, hardware, model, flops, notes)
    setup.micro_batch_rows  # noqa: B018 (checks that the rows can be dealt out)
    return setup


def check(setup: Setup) -> None:
    """Check the rest of what arithmetic can.

    Raises:
        UserError: the run would refuse to start on this hardware.
    """
    from gemma_xla.model.lora import check_lora
    from gemma_xla.train.build import plan_shards
    from gemma_xla.train.checks import check_int8, check_scan, check_seq_len

    tensor, hosts = setup.hardware.mesh.tensor, setup.hardware.num_hosts
    if tensor > 1 and hosts > 1:
        raise UserError(
            f"mesh.tensor is {tensor}; {setup.hardware.name} has {hosts} hosts, and with several it must be 1"
        )
    check_seq_len(setup.config, setup.model)
    check_scan(setup.config, setup.model)
    check_int8(setup.config, setup.micro_batch_rows, setup.hardware.slice_mesh.batch_shards)
    if setup.config.lora:
        check_lora(setup.config.lora, setup.model)
    plan_shards(setup.model, setup.hardware.slice_mesh, setup.config.lora)


def _architecture(config: RunConfig) -> tuple[GemmaConfig, tuple[str, ...]]:
    section, notes = config.model, ()
    if section.init_from is None:
        model = preset(section.preset or "gemma-2b")
    elif (name := section.init_from.rpartition("/")[2]) in PRESETS and not location(section.init_from).exists():
        # On the hub, and gated: what matters here is known without it.
        model, notes = PRESETS[name], (f"{section.init_from} was taken to have the architecture of the preset {name}",)
    else:
        from gemma_xla.weights import read_architecture

        try:
            model = read_architecture(section.init_from, lora=config.lora is not None)
        except UserError as error:
            raise UserError(f"model.init_from: {error}") from error
    return model.replace(**section.overrides), notes
