"""Sums over the instructions of a compiled program."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

from gemma_xla.plan.result import Collective, Matmul


@dataclass
class Tally:
    """What a computation costs.

    Attributes:
        seconds: by part of the model.
        collectives: by kind, axis and whether they overlap.
        matmuls: by name.
        unpriced: how often each operation occurs that has no price.
        waiting: seconds that collectives take beyond the computation they could hide behind.
    """

    seconds: Counter[str] = field(default_factory=Counter)
    collectives: dict[tuple[str, str, bool], Collective] = field(default_factory=dict)
    matmuls: dict[str, Matmul] = field(default_factory=dict)
    unpriced: Counter[str] = field(default_factory=Counter)
    waiting: float = 0.0

    @property
    def computing(self) -> float:
        """Seconds of computation."""
        return self.seconds.total()

    def communicating(self, overlaps: bool) -> float:
        """Seconds of the collectives that do, or do not, overlap."""
        return sum(one.seconds for one in self.collectives.values() if one.overlaps == overlaps)

    @property
    def total(self) -> float:
        """Seconds from beginning to end."""
        return self.computing + self.communicating(overlaps=False) + self.waiting

    def add(self, other: Tally, times: int = 1) -> None:
        """Add what runs so many times."""
        for part, seconds in other.seconds.items():
            self.seconds[part] += seconds * times
        for name, count in other.unpriced.items():
            self.unpriced[name] += count * times
        for one in other.collectives.values():
            count, num_bytes, seconds = one.count * times, one.num_bytes * times, one.seconds * times
            self.collect(replace(one, count=count, num_bytes=num_bytes, seconds=seconds))
        for one in other.matmuls.values():
            seconds, ideal = one.seconds * times, one.ideal_seconds * times
            self.multiply(replace(one, count=one.count * times, seconds=seconds, ideal_seconds=ideal))
        self.waiting += other.waiting * times

    def collect(self, one: Collective) -> None:
        """Add collectives to those of their kind."""
        key = (one.kind, one.axis, one.overlaps)
        before = self.collectives.get(key)
        if before:
            count, num_bytes = before.count + one.count, before.num_bytes + one.num_bytes
            one = replace(one, count=count, num_bytes=num_bytes, seconds=before.seconds + one.seconds)
        self.collectives[key] = one

    def multiply(self, one: Matmul) -> None:
        """Add products to those of their name."""
        before = self.matmuls.get(one.name)
        if before:
            seconds, ideal = before.seconds + one.seconds, before.ideal_seconds + one.ideal_seconds
            one = replace(one, count=before.count + one.count, seconds=seconds, ideal_seconds=ideal)
        self.matmuls[one.name] = one
