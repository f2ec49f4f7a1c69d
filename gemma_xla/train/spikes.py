"""Steps that stand out: a loss or gradient norm far above what the steps before let expect."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from itertools import islice, pairwise

FIGURES = ("loss", "grad_norm")
# Steps that say how much figures scatter, how many there must be, and how many of the latest say what is usual.
WINDOW, ENOUGH, LATEST = 200, 50, 25
# Of two values of a normal distribution, 95 percent are no farther apart than so many standard deviations. What lies
# beyond does not count. A median would count less, but gradient norms of small batches have heavy tails.
_INNER, _DEVIATIONS = 0.95, 1.96 * math.sqrt(2)
# Figures closer together than this fraction of themselves do not differ in a way worth telling.
_GRAIN = 0.01
# What is said of a batch's text, in characters.
_LONGEST = 1000


def outlier(value: float, before: Sequence[float]) -> float:
    """By how many standard deviations a figure exceeds those before it.

    Of the logarithms, as gradient norms are skewed. What is usual is the median of the latest; how much they scatter
    is the 95th percentile of the differences from one to the next, which a fall of all of them hardly moves. Nor do
    one or two earlier spikes in a hundred steps move either (Hampel, JASA 69, 1974).

    Args:
        value: not negative.
        before: at least two figures, oldest first.
    """
    logs = [_log(figure) for figure in before]
    middle = statistics.median(logs[-LATEST:])
    differences = sorted(abs(b - a) for a, b in pairwise(logs))
    spread = differences[int(_INNER * len(differences))] / _DEVIATIONS
    return (_log(value) - middle) / max(spread, _GRAIN)


def spikes(record: dict[str, float], before: Sequence[dict[str, float]], threshold: float) -> dict[str, float]:
    """Return, for each of a step's figures that stands out, ``"loss_spike"`` and how far (`outlier`).

    Args:
        record: that of the step.
        before: those of the steps before, oldest first.
        threshold: what is far, in standard deviations; 0: nothing is.
    """
    latest = before[-WINDOW:]
    if not threshold or len(latest) < ENOUGH:
        return {}
    found = {f"{name}_spike": outlier(record[name], [r[name] for r in latest]) for name in FIGURES}
    return {name: far for name, far in found.items() if far > threshold}


def note_spikes(
    record: dict[str, float],
    records: Sequence[dict[str, float]],
    threshold: float,
    rows: str,
    say: Callable[[str], None],
) -> dict[str, float]:
    """Return a step's record with its `spikes`; ``say`` the first of several in a row.

    Args:
        records: all before it, evaluations too.
        rows: what the text of its batch is, a line per row.
    """
    steps = (r for r in reversed(records) if "loss" in r)
    before = list(islice(steps, WINDOW))[::-1]
    record = record | spikes(record, before, threshold)
    if _is_spike(record) and not _is_spike(before[-1]):
        say(_describe(record, before, rows))
    return record


def _is_spike(record: dict[str, float]) -> bool:
    return any(f"{name}_spike" in record for name in FIGURES)


def _describe(record: dict[str, float], before: Sequence[dict[str, float]], rows: str) -> str:
    figures = []
    for name in (name for name in FIGURES if f"{name}_spike" in record):
        usual = statistics.median(r[name] for r in before[-LATEST:])
        words = name.replace("grad_norm", "gradient norm")
        figures.append(f"{words} {record[name]:.4g}, usually {usual:.4g} ({record[f'{name}_spike']:.0f} deviations)")
    text = rows.replace("\n", "; ")
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
    return f"warning: step {record['step']} stands out: {'; '.join(figures)}; its text: {text}"


def _log(figure: float) -> float:
    return math.log(max(figure, 1e-30))
