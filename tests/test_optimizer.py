"""Schedules against transformers', AdamW's groups and state."""

import pytest
import torch
from transformers import get_scheduler

from gemma_xla.backend import Backend
from gemma_xla.config import OptimizerSection, ScheduleSection
from gemma_xla.model.config import preset
from gemma_xla.train.build import build_model, initial
from gemma_xla.train.optimizer import MOMENTS, build_optimizer, learning_rate_fraction

CASES = {
    "cosine": (ScheduleSection(kind="cosine", warmup_steps=5, final=0.0), "cosine", {}),
    "cosine to a floor": (
        ScheduleSection(kind="cosine", warmup_steps=5, final=0.1),
        "cosine_with_min_lr",
        {"min_lr_rate": 0.1},
    ),
    "linear": (ScheduleSection(kind="linear", warmup_steps=7, final=0.0), "linear", {}),
    "constant": (ScheduleSection(kind="constant", warmup_steps=4), "constant_with_warmup", {}),
    # Theirs warms up from the floor; ours, like all others, from zero.
    "wsd": (
        ScheduleSection(kind="wsd", warmup_steps=0, decay_steps=12, final=0.05),
        "warmup_stable_decay",
        {"num_decay_steps": 12, "min_lr_ratio": 0.05},
    ),
    "no warm-up": (ScheduleSection(kind="cosine", final=0.0), "cosine", {}),
}


@pytest.mark.parametrize("name", CASES)
def test_schedule_equals_transformers(name):
    section, theirs, options = CASES[name]
    total = 40
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(theirs, optimizer, section.warmup_steps, total, scheduler_specific_kwargs=options)
    expected = []
    for _ in range(total):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    ours = [learning_rate_fraction(step, total, section) for step in range(total)]
    assert ours == pytest.approx(expected, abs=1e-12)


def test_linear_ends_at_its_floor():
    section = ScheduleSection(kind="linear", warmup_steps=0, final=0.25)
    assert learning_rate_fraction(0, 10, section) == 1.0
    assert learning_rate_fraction(5, 10, section) == pytest.approx(0.625)
    assert learning_rate_fraction(10, 10, section) == pytest.approx(0.25)


def _optimizer():
    config, backend = preset("gemma-test"), Backend(torch.device("cpu"))
    model, specs = build_model(config, backend, initial(config, backend, 0), "sdpa")
    return model, build_optimizer(model, specs, backend, OptimizerSection(weight_decay=0.3))


def test_only_matrices_decay():
    model, optimizer = _optimizer()
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.0 if name.endswith("norm.weight") else 0.3), name


def test_state_is_there_before_the_first_step_and_float32():
    model, optimizer = _optimizer()
    for parameter in model.parameters():
        for moment in MOMENTS:
            state = optimizer.state[parameter][moment]
            assert state.dtype == torch.float32 and state.shape == parameter.shape and not state.any()


def test_prepared_state_changes_nothing():
    """AdamW with state made in advance takes the steps of one that makes its own."""
    model, optimizer = _optimizer()
    twin, _ = _optimizer()
    plain = torch.optim.AdamW(
        [
            {"params": [p for p in twin.parameters() if p.dim() > 1], "weight_decay": 0.3},
            {"params": [p for p in twin.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=OptimizerSection().lr,
        betas=(0.9, 0.95),
    )
    for step in range(3):
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            torch.manual_seed(step)
            ours.grad = torch.randn_like(ours)
            theirs.grad = ours.grad.clone()
        optimizer.step()
        plain.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)
