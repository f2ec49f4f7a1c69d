"""AdamW (arXiv:1711.05101) and the learning rate over time."""

from __future__ import annotations

import math

import torch

from gemma_xla.backend import Backend
from gemma_xla.config import OptimizerSection, ScheduleSection
from gemma_xla.model.gemma import Gemma
from gemma_xla.sharding import Spec
from gemma_xla.train.build import trained

MOMENTS = ("exp_avg", "exp_avg_sq")


def build_optimizer(
    model: Gemma, specs: dict[str, Spec], backend: Backend, section: OptimizerSection
) -> torch.optim.AdamW:
    """AdamW whose state, float32, exists from the start and is split like the parameters.

    Weight decay applies to matrices only. State that appeared during the first step would make the second step another
    graph, and compile again.
    """
    groups = [
        {"params": [p for _, p in trained(model) if p.dim() > 1], "weight_decay": section.weight_decay},
        {"params": [p for _, p in trained(model) if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=section.lr,
        betas=(section.beta1, section.beta2),
        eps=section.eps,
        **backend.optimizer_options(),
    )
    for name, parameter in trained(model):
        state = optimizer.state[parameter]
        state["step"] = step_count(optimizer, 0, backend)
        for moment in MOMENTS:
            state[moment] = backend.zeros_like(parameter, specs[name])
    return optimizer


def step_count(optimizer: torch.optim.AdamW, step: int, backend: Backend) -> torch.Tensor:
    """The number of steps taken, as AdamW wants it: on the device when the device does the bias correction."""
    options = optimizer.param_groups[0]
    count = torch.tensor(float(step))
    return backend.place(count, ()) if options["capturable"] or options["fused"] else count


def learning_rate_fraction(step: int, total: int, section: ScheduleSection) -> float:
    """The learning rate of a step as a fraction of the highest.

    A function of the step alone: there is no state to save. Equal to the schedules of ``transformers``.

    Args:
        step: steps taken so far.
        total: steps of the whole run.
        section: the config's ``train.schedule``.
    """
    warmup = section.warmup_steps
    if step < warmup:
        return step / warmup
    if section.kind == "constant":
        return 1.0
    start = total - section.decay_steps if section.kind == "wsd" else warmup
    progress = min(1.0, max(0.0, (step - start) / max(1, total - start)))
    left = 1.0 - progress if section.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return section.final + (1.0 - section.final) * left
