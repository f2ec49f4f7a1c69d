"""Look for the settings that train most tokens per dollar, or fastest: arithmetic first, the compiler for the best."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gemma_xla.chips import cost
from gemma_xla.config import RunConfig
from gemma_xla.errors import UserError
from gemma_xla.plan.arithmetic import bounds
from gemma_xla.plan.result import HbmUse, Plan
from gemma_xla.plan.settings import Settings, Variants, settings_of, tensor_sizes
from gemma_xla.plan.setup import Setup, prepare
from gemma_xla.plan.slices import Hardware
from gemma_xla.plan.step_time import step_time

Ask = Callable[[RunConfig, Hardware], Plan]
By = Literal["dollars", "time"]
# Rows per micro-batch and device that are tried.
_ROWS = (1, 2, 4, 8, 16, 32, 64)
# Steps of more rows than this many times the config's are another training.
_MOST_ROWS = 4


@dataclass(frozen=True)
class Row:
    """What became of one of the settings that were compiled: a plan, or a reason why there is none."""

    settings: Settings
    plan: Plan | None
    reason: str | None = None

    @property
    def fits(self) -> bool:
        return self.plan is not None and self.plan.memory.fits and self.plan.figures is not None


@dataclass(frozen=True)
class Tuning:
    """What `tune` found.

    Attributes:
        config: what was tuned.
        base: its own settings, on each of the slices.
        rows: the best first; what does not fit at the end.
        pruned: how many settings were not compiled, by reason.
    """

    config: RunConfig
    base: list[Settings]
    rows: list[Row]
    pruned: Counter[str]

    @property
    def winner(self) -> Row | None:
        """The best of those that fit."""
        return self.rows[0] if self.rows and self.rows[0].fits else None

    def keeps_rows(self, row: Row) -> bool:
        """Whether a step has as many sequences as the config asks for."""
        return row.settings.rows == next(b.rows for b in self.base if b.topology == row.settings.topology)


def tune(
    config: RunConfig,
    slices: Sequence[Hardware],
    ask: Ask,
    *,
    finalists: int = 6,
    by: By = "dollars",
    say: Callable[[str], None] = print,
) -> Tuning:
    """Try meshes, batch sizes and rematerialisation.

    What cannot be built, or cannot fit by a bound of its memory, is dropped. The rest is ordered by the bound of its
    time (or price) per token, and ``ask`` plans the first few. Its answers decide what comes next: what is larger in
    every respect than something that did not fit is dropped too, and what is likely not to fit waits. The first on each
    slice has as many rows per step as the config asks for, if there is such.

    Args:
        config: the run's; its rows per step are kept where micro-batches can make them up.
        slices: where it may run.
        ask: plans one candidate; a `UserError` becomes its row's reason.
        finalists: how many candidates are planned at most.
        by: "dollars" ranks by tokens per dollar, "time" by the time per token.
        say: shows a line of progress for each.
    """
    base = [settings_of(prepare(config, where).resolved().config, where) for where in slices]
    search = _Search(Variants(config), by)
    for own, where in zip(base, slices, strict=True):
        search.add(own, where)
    rows = []
    total = min(finalists, len(search.waiting))
    while search.waiting and len(rows) < total:
        seen = {row.settings.topology for row in rows}
        candidate = search.take({own.topology: own.rows for own in base if own.topology not in seen})
        say(f"{len(rows) + 1} of {total}: {describe(candidate.settings)}")
        rows.append(search.answer(candidate, ask))
    search.pruned["not among the finalists"] += len(search.waiting)
    return Tuning(config, base, sorted(rows, key=lambda row: _rank(row, by)), +search.pruned)


def describe(settings: Settings) -> str:
    """The settings in a line."""
    s = settings
    mesh = f"data {s.data}, fsdp {s.fsdp}" + (f", tensor {s.tensor}" if s.tensor > 1 else "")
    return f"{s.topology}, {mesh}, batch {s.batch_size_per_device} x {s.grad_accum}, remat {remat(s)}"


def remat(settings: Settings) -> str:
    """What is computed twice, in a few words."""
    kept = ", ".join(name.removesuffix("_proj") for name, _ in settings.keep)
    return settings.remat + (f" but {kept}" if kept else "")


@dataclass(frozen=True)
class _Candidate:
    settings: Settings
    setup: Setup
    least: HbmUse
    # Per token: bounds with everything hidden and with nothing hidden.
    value: tuple[float, float]

    @property
    def kind(self) -> tuple:
        """All but how the data and fsdp axes share the chips, which makes the least difference."""
        s = self.settings
        return s.topology, s.tensor, s.batch_size_per_device, remat(s)


@dataclass
class _Search:
    variants: Variants
    by: By
    waiting: list[_Candidate] = field(default_factory=list)
    pruned: Counter[str] = field(default_factory=Counter)
    # By rematerialisation: how many times their bound the compiler's temporaries are, at least.
    excess: dict[str, float] = field(default_factory=dict)
    # How many meshes of a kind were planned.
    tried: Counter[tuple] = field(default_factory=Counter)

    def add(self, own: Settings, where: Hardware) -> None:
        """Queue what may fit on a slice."""
        for settings in _candidates(own, where, self.variants.kept_choices):
            try:
                setup = self.variants.setup(settings)
            except UserError as error:
                self.pruned[f"cannot be built: {error}"] += 1
                continue
            least, _ = bounds(setup)
            if least.fits:
                self.waiting.append(_Candidate(settings, setup, least, _least_value(setup, self.by)))
            else:
                self.pruned["cannot fit: the bound of its memory is above what there is"] += 1

    def take(self, unseen: dict[str, int]) -> _Candidate:
        """Remove and return the most promising one.

        Args:
            unseen: slices of which none was taken yet, and the rows per step asked for there; they go first.
        """
        self.waiting.sort(key=lambda c: (self._unlikely(c), self.tried[c.kind], *c.value, c.least.used))
        first = [c for c in self.waiting if c.settings.topology in unseen] or self.waiting
        candidate = next((c for c in first if unseen.get(c.settings.topology) == c.settings.rows), first[0])
        self.waiting.remove(candidate)
        self.tried[candidate.kind] += 1
        return candidate

    def answer(self, candidate: _Candidate, ask: Ask) -> Row:
        """Plan one, and learn from it about the others."""
        try:
            plan = ask(candidate.setup.config, candidate.setup.hardware)
        except UserError as error:
            return Row(candidate.settings, None, str(error))
        if plan.compiled:
            policy = remat(candidate.settings)
            excess = plan.memory.temporaries / candidate.least.temporaries
            self.excess[policy] = min(excess, self.excess.get(policy, excess))
        if not plan.memory.fits:
            left = [other for other in self.waiting if not _larger(other, candidate)]
            self.pruned["larger in every respect than one that does not fit"] += len(self.waiting) - len(left)
            self.waiting = left
        return Row(candidate.settings, plan)

    def _unlikely(self, candidate: _Candidate) -> bool:
        least, excess = candidate.least, self.excess.get(remat(candidate.settings), 1.0)
        return least.used + least.temporaries * (excess - 1) > least.available


def _candidates(own: Settings, where: Hardware, kept: list[dict[str, Any]]) -> Iterator[Settings]:
    """Every way to share a slice's chips out in powers of two, each with all batch sizes and all that may be kept."""
    chips = where.slice.num_chips
    for tensor, power, rows, policy in itertools.product(tensor_sizes(where), range(chips.bit_length()), _ROWS, kept):
        copies = 2**power
        if chips % (copies * tensor):
            continue
        mesh = {"data": where.count * copies, "fsdp": chips // copies // tensor, "tensor": tensor}
        settings = dataclasses.replace(own, **mesh, batch_size_per_device=rows, **policy).keep_rows(own.rows)
        if rows == 1 or settings.rows <= _MOST_ROWS * own.rows:
            yield settings


def _least_value(setup: Setup, by: By) -> tuple[float, float]:
    time, hardware = step_time(setup), setup.hardware
    per_token = 1 / (setup.rows * setup.flops.seq_len)
    if by == "dollars":
        per_token *= cost(hardware.chip, hardware.num_chips, 1 / 3600)
    return time.least * per_token, time.most * per_token


def _larger(one: _Candidate, other: _Candidate) -> bool:
    """Whether one needs more memory than the other whatever the compiler does."""
    a, b = one.settings, other.settings
    return (
        (a.topology, a.data, a.fsdp, a.tensor) == (b.topology, b.data, b.fsdp, b.tensor)
        and (a.remat == "none" or (a.remat == b.remat and set(a.keep) >= set(b.keep)))
        and a.batch_size_per_device >= b.batch_size_per_device
        and one.least.used >= other.least.used
    )


def _rank(row: Row, by: By) -> tuple[int, float]:
    if row.plan is None:
        return 2, 0.0
    if not row.fits:
        return 1, row.plan.memory.used
    figures = row.plan.figures
    return 0, -figures.tokens_per_dollar if by == "dollars" else figures.step_seconds / row.plan.tokens_per_step
