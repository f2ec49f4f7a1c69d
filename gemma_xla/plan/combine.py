"""The graphs of a step as one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

from gemma_xla.plan.result import Collective, Estimate, Matmul


def combine(graphs: list[tuple[Estimate, int]], between_slices: Collective | None = None) -> Estimate:
    """Add up graphs that run one after the other, each as often as its number says.

    Args:
        graphs: a step's.
        between_slices: what follows once, and hides behind nothing.
    """
    parts: dict[str, float] = defaultdict(float)
    for graph, times in graphs:
        for name, seconds in graph.parts.items():
            parts[name] += seconds * times
    extra = between_slices.seconds if between_slices else 0.0
    if extra:
        parts["collectives"] += extra
    return Estimate(
        seconds=sum(graph.seconds * times for graph, times in graphs) + extra,
        upper_bound_seconds=sum(graph.upper_bound_seconds * times for graph, times in graphs) + extra,
        parts=dict(parts),
        collectives=_collectives(graphs) + ([between_slices] if between_slices else []),
        matmuls=sorted(_matmuls(graphs), key=lambda m: m.ideal_seconds - m.seconds),
        unpriced=sorted({name for graph, _ in graphs for name in graph.unpriced}),
    )


def _collectives(graphs: list[tuple[Estimate, int]]) -> list[Collective]:
    """Those of one kind and axis as one."""
    found: dict[tuple[str, str, bool], Collective] = {}
    for graph, times in graphs:
        for one in graph.collectives:
            key = (one.kind, one.axis, one.overlaps)
            before = found.get(key, replace(one, count=0, num_bytes=0, seconds=0.0))
            found[key] = replace(
                one,
                count=before.count + one.count * times,
                num_bytes=before.num_bytes + one.num_bytes * times,
                seconds=before.seconds + one.seconds * times,
            )
    return sorted(found.values(), key=lambda one: -one.seconds)


def _matmuls(graphs: list[tuple[Estimate, int]]) -> Iterable[Matmul]:
    for graph, times in graphs:
        for one in graph.matmuls:
            seconds, ideal = one.seconds * times, one.ideal_seconds * times
            yield replace(one, count=one.count * times, seconds=seconds, ideal_seconds=ideal)
