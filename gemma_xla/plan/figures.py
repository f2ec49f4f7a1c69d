"""How fast and how dear a step is, from its time."""

from __future__ import annotations

from gemma_xla.chips import cost
from gemma_xla.errors import UserError
from gemma_xla.plan.result import Figures
from gemma_xla.plan.setup import Setup

_HOUR, _DAY = 3600, 24 * 3600


def figures(setup: Setup, step_seconds: float, upper_bound_seconds: float, tokens: float | None = None) -> Figures:
    """Return what follows from the time of a step.

    Args:
        setup: what is planned.
        step_seconds: of a whole step, all micro-batches and the traffic between slices included.
        upper_bound_seconds: the same with nothing hidden behind anything.
        tokens: to train on; None: those of the run, where its config says how many steps it takes.

    Raises:
        UserError: the chip's price is 0.
    """
    chip, num_chips = setup.hardware.chip, setup.hardware.num_chips
    if not chip.price.value > 0:
        raise UserError(f"hardware.price is {chip.price.value:g}; set it above 0, or there are no tokens per dollar")
    tokens_per_step = setup.rows * setup.flops.seq_len
    speed = tokens_per_step / step_seconds / num_chips
    dollars_per_hour = cost(chip, num_chips, 1)
    if tokens is None and (steps := setup.config.train.steps):
        tokens = steps * tokens_per_step
    seconds = None if tokens is None else tokens / (speed * num_chips)
    return Figures(
        step_seconds=step_seconds,
        upper_bound_seconds=upper_bound_seconds,
        mfu=setup.flops.mfu(speed, chip.peak_flops.value),
        mfu_full_square=setup.flops.mfu(speed, chip.peak_flops.value, causal=False),
        tokens_per_second=speed,
        tokens_per_dollar=speed * num_chips * _HOUR / dollars_per_hour,
        dollars_per_hour=dollars_per_hour,
        price=chip.price.value,
        price_source=chip.price.source,
        price_date=chip.price.date,
        tokens=tokens,
        days=None if seconds is None else seconds / _DAY,
        dollars=None if seconds is None else cost(chip, num_chips, seconds / _HOUR),
    )
