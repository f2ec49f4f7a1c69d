"""Our plans beside the published speeds, as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from gemma_xla.drawing import BLUE, GREEN, INK, ORANGE, PAPER, at_end, label, legend, new_figure
from gemma_xla.plan.published import PUBLISHED, Key

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from gemma_xla.plan.result import Plan

_KINDS = {
    "published: measured": {"color": BLUE},
    "ours: ESTIMATE from the compiled program": {"color": GREEN},
    "ours: bound by arithmetic, no run can exceed it": {"color": PAPER, "hatch": "///"},
}


def draw_published(plans: Mapping[Key, Plan | None]) -> Figure:
    """MFU of each published row, and of our plan of it: what the compiler says, or else what arithmetic does.

    Args:
        plans: by model, slice and precision; None, or absent: not planned. What does not fit has no speed.
    """
    figure, ((axes,),) = new_figure(10, 6.5)
    measured, estimate, bound = _KINDS
    for place, row in enumerate(PUBLISHED):
        bars = {measured: row.mfu}
        plan = plans.get(row.key)
        if plan is not None and plan.figures is not None and plan.memory.fits:
            bars[estimate if plan.compiled else bound] = plan.figures.mfu_full_square
        for i, (kind, mfu) in enumerate(bars.items()):
            at = place + 0.36 * (i - 0.5)
            axes.barh(at, 100 * mfu, height=0.36, edgecolor=INK, linewidth=0.6, **_KINDS[kind])
            at_end(axes, 100 * mfu, at, f"{100 * mfu:.1f}")
    axes.axvline(100, color=ORANGE, linewidth=1.2)
    names = [f"{row.model}, {row.slice}{', int8' * (row.precision == 'int8')}" for row in PUBLISHED]
    axes.set_yticks(range(len(PUBLISHED)), names)
    axes.invert_yaxis()
    title = "compare estimates with estimates only: this method is 6 to 32% high"
    label(axes, title, "MFU (%) of the bfloat16 peak, full square")
    for kind, style in _KINDS.items():
        axes.barh(0, 0, label=kind, edgecolor=INK, linewidth=0.6, **style)
    legend(axes, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)
    return figure
