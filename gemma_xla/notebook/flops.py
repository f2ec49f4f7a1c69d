"""Where FLOPs go, and what is left of the hardware's speed, as pictures. The figures are `gemma_xla.flops`'s."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from gemma_xla.drawing import BLUE, COLOURS, GREEN, INK, ORANGE, SKY, at_end, label, legend, new_figure
from gemma_xla.errors import UserError
from gemma_xla.flops import FlopCounter

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from gemma_xla.model.config import GemmaConfig

# The counter's terms, by what they belong to.
_GROUPS = {
    "projections (q, k, v, o)": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "feed-forward (gate, up, down)": ("gate_proj", "up_proj", "down_proj"),
    "output head": ("lm_head",),
    "attention scores and values": ("attention",),
    "adapters": ("adapters",),
}
_MFU = {
    "mfu": "all tokens, causal",
    "mfu_full_square": "all tokens, full square",
    "mfu_real_tokens": "real tokens, causal",
}


def grouped(counter: FlopCounter, causal: bool = True) -> dict[str, float]:
    """FLOPs of a token in training by what they are for; what is absent is left out."""
    terms = {term.name: term.training / counter.seq_len for term in counter.terms(causal)}
    sums = {group: sum(terms.get(name, 0.0) for name in names) for group, names in _GROUPS.items()}
    return {group: flops for group, flops in sums.items() if flops}


def draw_terms(counters: Mapping[str, tuple[FlopCounter, bool]]) -> Figure:
    """A bar for each counter, by name: what a token of training costs, and what for.

    Args:
        counters: each with whether attention is counted causally, or as the whole square.
    """
    figure, ((axes,),) = new_figure(10, 1.6 + 0.45 * len(counters))
    ends = dict.fromkeys(counters, 0.0)
    for group, colour in zip(_GROUPS, COLOURS, strict=False):
        sizes = {name: grouped(*counted).get(group, 0.0) / 1e9 for name, counted in counters.items()}
        if any(sizes.values()):
            bars = {"left": list(ends.values()), "color": colour, "edgecolor": INK, "linewidth": 0.6}
            axes.barh(list(sizes), list(sizes.values()), label=group, **bars)
        ends = {name: ends[name] + size for name, size in sizes.items()}
    for name, end in ends.items():
        at_end(axes, end, name, f"{end:.2f}")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.08 * max(ends.values()))
    label(axes, x="GFLOP per token in training")
    legend(axes, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
    return figure


def draw_lengths(config: GemmaConfig, seq_lens: Sequence[int]) -> Figure:
    """Attention's share of a model's FLOPs in training against the length of its rows, by both conventions.

    Raises:
        UserError: a length is not one that the model can have.
    """
    figure, ((axes,),) = new_figure(7, 3.4)
    for causal, name, colour in ((False, "full square", ORANGE), (True, "causal", BLUE)):
        shares = []
        for length in seq_lens:
            parts = grouped(FlopCounter(config, length), causal)
            shares.append(100 * parts["attention scores and values"] / sum(parts.values()))
        axes.plot(seq_lens, shares, "o-", color=colour, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(seq_lens, [f"{length:,}" for length in seq_lens])
    axes.set_ylim(0, None)
    axes.grid(alpha=0.3)
    label(axes, x="tokens per row", y="attention's share of FLOPs (%)")
    legend(axes)
    return figure


def draw_mfu(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """The MFU of runs, by name, counted in three ways: medians over their steps.

    Args:
        runs: the records of each, from `gemma_xla.train.metrics.read_metrics`.

    Raises:
        UserError: a run has taken no step.
    """
    figure, ((axes,),) = new_figure(10, 1.4 + 0.75 * len(runs))
    for place, (name, records) in enumerate(runs.items()):
        steps = [record for record in records if "mfu" in record]
        if not steps:
            raise UserError(f"{name!r} has no steps to draw; run it first")
        for i, (key, colour) in enumerate(zip(_MFU, (BLUE, SKY, GREEN), strict=True)):
            value = 100 * statistics.median(step[key] for step in steps)
            at, style = place + 0.25 * (i - 1), {"edgecolor": INK, "linewidth": 0.6}
            axes.barh(at, value, height=0.25, color=colour, label=_MFU[key] if place == 0 else None, **style)
            at_end(axes, value, at, f"{value:.1f}")
    axes.set_yticks(range(len(runs)), list(runs))
    axes.invert_yaxis()
    axes.margins(x=0.08)
    label(axes, x="MFU (% of the chip's peak)")
    legend(axes, loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=3)
    return figure
