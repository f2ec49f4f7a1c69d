"""One config on several slices, with several batch sizes, with and without rematerialisation: by arithmetic, at once.

What cannot fit by these bounds does not fit; of the rest, the compiler says which does.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.patches import Rectangle

from gemma_xla.config import RunConfig
from gemma_xla.drawing import INK, PAPER, label, legend, new_figure
from gemma_xla.errors import UserError
from gemma_xla.plan.answer import complete
from gemma_xla.plan.report import BOUNDS
from gemma_xla.plan.result import Plan
from gemma_xla.plan.settings import Variants, settings_of
from gemma_xla.plan.slices import hardware
from gemma_xla.plan.units import gib
from gemma_xla.plan.work import by_arithmetic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BILLION = 1e9
_GOOD, _BAD, _BEST = "#bfe3d5", "#e0e0e0", "#F0E442"


def sweep(
    config: RunConfig,
    name: str,
    slices: Sequence[str],
    batch_sizes: Sequence[int],
    remats: Sequence[str] = ("full", "none"),
    tokens: float | None = None,
) -> list[Plan]:
    """Return a plan of bounds for each slice, kind of rematerialisation and batch size, in this order.

    Args:
        config: what to plan; each step has one micro-batch.
        name: of the config.
        slices: such as v5e-256.
        batch_sizes: rows per device.
        remats: values of ``train.remat``.
        tokens: to train on, for days and dollars; None: those of the run.

    Raises:
        UserError: there is no such slice, or a setting does not suit the config.
    """
    variants, plans = Variants(config), []
    for slice_, remat, rows in itertools.product(slices, remats, batch_sizes):
        own = settings_of(config, hardware(config, slice_))
        setup = variants.setup(dataclasses.replace(own, batch_size_per_device=rows, remat=remat, grad_accum=1))
        plans.append(complete(by_arithmetic(setup), setup, name, tokens))
    return plans


def dollars_per_billion_tokens(plan: Plan) -> float | None:
    """The price of a billion tokens at the plan's speed; None: it has no speed."""
    return _BILLION / plan.figures.tokens_per_dollar if plan.figures else None


def draw_sweep(plans: Sequence[Plan]) -> Figure:
    """A table in colour: a row for each slice and kind of rematerialisation, a column for each batch size.

    Raises:
        UserError: there are no plans.
    """
    if not plans:
        raise UserError("plans: there are none to draw; sweep over one slice and one batch size at least")
    rows = list(dict.fromkeys(map(_row, plans)))
    columns = sorted({plan.settings["batch_size_per_device"] for plan in plans})
    able = [plan for plan in plans if plan.memory.fits and plan.figures]
    best = min(able, key=dollars_per_billion_tokens, default=None)
    title = f"{plans[0].config}: {BOUNDS}\nGiB per chip, and dollars per billion tokens"
    figure, ((axes,),) = new_figure(3 + 1.7 * len(columns), 1.5 + 0.5 * len(rows), title)
    for plan in plans:
        x, y = columns.index(plan.settings["batch_size_per_device"]), rows.index(_row(plan))
        colour = _BEST if plan is best else _GOOD if plan.memory.fits else _BAD
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, edgecolor=PAPER, linewidth=2))
        axes.text(x, y, _cell(plan), ha="center", va="center", fontsize=9, color=INK, parse_math=False)
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
    axes.set_xticks(range(len(columns)), [str(size) for size in columns])
    axes.set_yticks(range(len(rows)), rows)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    label(axes, x="sequences per chip")
    kinds = {"may fit": _GOOD, "cannot fit": _BAD, "cheapest that may fit": _BEST}
    marks = [Rectangle((0, 0), 1, 1, facecolor=colour) for colour in kinds.values()]
    legend(axes, handles=marks, labels=list(kinds), loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=len(kinds))
    return figure


def _row(plan: Plan) -> str:
    return f"{plan.topology} ({plan.num_chips} x {gib(plan.memory.available)} GiB), remat {plan.settings['remat']}"


def _cell(plan: Plan) -> str:
    memory, dollars = plan.memory, dollars_per_billion_tokens(plan)
    if not memory.fits:
        return f"{gib(memory.used)}: {gib(memory.used - memory.available)} over"
    return f"{gib(memory.used)}" + (f", ${dollars:.2f}" if dollars else "")
