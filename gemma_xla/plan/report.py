"""A plan as text for a terminal, and as JSON. Memory is in GiB: that is what chips are sold and compilers reckon by."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence
from typing import Any

from gemma_xla.errors import UserError
from gemma_xla.plan.hlo import arrays
from gemma_xla.plan.result import Buffer, Collective, Estimate, Figures, HbmUse, Matmul, Plan
from gemma_xla.plan.units import count, duration, gib, size

BOUNDS = "arithmetic only: bounds, not an estimate"
SCHEMA_VERSION = 1
UNITS = {
    "memory": "bytes per chip",
    "num_bytes": "bytes",
    "seconds, *_seconds, parts": "seconds per step",
    "mfu, mfu_full_square": "fraction of the peak in bfloat16",
    "tokens_per_second": "tokens per second and chip",
    "tokens_per_dollar": "tokens per dollar",
    "dollars_per_hour": "dollars per hour, all chips",
    "price": "dollars per chip-hour",
    "days, dollars": "for figures.tokens tokens",
}
_WIDTH = 100
_BAR = 40
_MATMULS = 10


def text(plan: Plan) -> str:
    """The whole plan for a terminal of 100 columns, plain ASCII; the first line is the answer."""
    blocks = [[answer(plan)], _question(plan), _memory(plan), _speed(plan)]
    if plan.estimate is not None:
        blocks += [_parts(plan.estimate), _collectives(plan.estimate), _matmuls(plan.estimate)]
    if not plan.memory.fits:
        blocks += [_largest(plan.memory), _bullets("what would make it fit, best first", plan.advice)]
    if plan.estimate is not None:
        blocks.append(_bullets("not priced: left out, or too little", plan.estimate.unpriced))
    blocks.append(_bullets("notes", plan.notes))
    blocks.append(_wrapped("with " + ", ".join(f"{name} {version}" for name, version in plan.versions.items())))
    return _ascii("\n\n".join("\n".join(lines) for lines in blocks if lines))


def answer(plan: Plan) -> str:
    """Whether it fits, in one line."""
    memory = plan.memory
    least = "" if plan.compiled else "at least "
    use = f"{least}{gib(memory.used)} of {gib(memory.available)} GiB"
    line = f"does not fit: {use}, {least}{gib(memory.used - memory.available)} GiB too much"
    if memory.fits:
        line = f"fits: {use}" if plan.compiled else f"may fit: {use}"
    return _marked(line, plan)


def memory_parts(memory: HbmUse) -> dict[str, int]:
    """What `HbmUse.used` is made of, in bytes; "other" is what the compiler adds to the parts that have names."""
    names = ("parameters", "optimizer", "gradients", "batch", "temporaries", "program")
    parts = {name: getattr(memory, name) for name in names}
    other = memory.used - sum(parts.values())
    return {**parts, "other": other} if other > 0 else parts


def aligned(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,), width: int = _WIDTH) -> list[str]:
    """Lines of a table, two blanks between columns, the last one cut where the line ends.

    Args:
        rows: the header first.
        left: columns that begin at the same place; the others end there.
    """
    rows = [[" ".join(cell.split()) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        sides = ["<" if i in left else ">" for i in range(len(row))]
        cells = [f"{cell:{side}{size}}" for cell, side, size in zip(row, sides, widths, strict=True)]
        lines.append(_cut(("  " + "  ".join(cells)).rstrip(), width))
    return lines


def comparison(plans: Sequence[Plan]) -> str:
    """One row for each plan, a star at the most tokens per dollar among those that fit; estimates beat bounds."""
    best = _best(plans)
    tokens = next((plan.figures.tokens for plan in plans if plan.figures and plan.figures.tokens), None)
    header = ["", "slice", "chips", "GiB", "fits", "step s", "MFU", "tok/s", "tok/$"]
    header += ["days", "dollars"] if tokens else []
    table = aligned([header, *(_compared(plan, plan is best, len(header)) for plan in plans)], left=(0, 1))
    lines = table[:1]
    for row, difference in zip(table[1:], _differences(plans), strict=True):
        lines += [row, *_wrapped(difference, "      ")]
    lines.append("")
    if any(plan.compiled for plan in plans):
        lines.append("Times are ESTIMATES from the compiled program: nothing was measured.")
    lines.append("GiB: per chip; MFU: causal; tok/s: per chip; *: most tokens per dollar")
    lines += _wrapped(_too_fast(plans), "")
    lines += ["~: " + BOUNDS] if not all(plan.compiled for plan in plans) else []
    lines += [f"days and dollars: for {count(tokens)} tokens"] if tokens else []
    return _ascii("\n".join(lines))


def _too_fast(plans: Sequence[Plan]) -> str:
    """Which plans leave something out of their time."""
    named = [plan.topology for plan in plans if plan.estimate and plan.estimate.unpriced]
    return (
        f"too fast, as some of it has no price (`gemma-xla plan` alone says what): {', '.join(named)}" if named else ""
    )


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as values that JSON can hold: `Plan`'s fields, what they are measured in, and whether it fits."""
    head = {"schema_version": SCHEMA_VERSION, "units": dict(UNITS), "fits": plan.memory.fits}
    return {**head, **dataclasses.asdict(plan)}


def from_json(data: dict[str, Any]) -> Plan:
    """The plan that `to_json` was given.

    Raises:
        UserError: it is of another version, or something is missing.
    """
    try:
        if data["schema_version"] != SCHEMA_VERSION:
            raise UserError(f"plan: schema_version is {data['schema_version']}, not {SCHEMA_VERSION}; plan anew")
        fields = {field.name: data[field.name] for field in dataclasses.fields(Plan)}
        fields["memory"] = HbmUse(**{**data["memory"], "largest": [Buffer(**b) for b in data["memory"]["largest"]]})
        if (estimate := data["estimate"]) is not None:
            collectives = [Collective(**entry) for entry in estimate["collectives"]]
            matmuls = [Matmul(**entry) for entry in estimate["matmuls"]]
            fields["estimate"] = Estimate(**{**estimate, "collectives": collectives, "matmuls": matmuls})
        if data["figures"] is not None:
            fields["figures"] = Figures(**data["figures"])
        return Plan(**fields)
    except (KeyError, TypeError) as error:
        raise UserError(f"plan: this is not what a plan is stored as ({error!r}); plan anew") from error


def _question(plan: Plan) -> list[str]:
    lines = [f"{plan.config} on {plan.topology}: {plan.num_chips:,} {plan.chip} chips, mesh {_pairs(plan.mesh)}"]
    lines.append(_pairs(plan.settings))
    lines.append(f"{plan.rows:,} rows, {plan.tokens_per_step:,} tokens per step")
    return [part for line in lines for part in _wrapped(line)]


def _memory(plan: Plan) -> list[str]:
    memory = plan.memory
    scale = max(memory.available, memory.used)
    sizes = memory_parts(memory)
    rest = memory.available - memory.used
    rows = []
    for name, held in {**sizes, "free" if rest >= 0 else "too much": abs(rest)}.items():
        mark = "." if name == "free" else "!" if name == "too much" else "#"
        rows.append([name, size(held), f"{held / memory.available:.1%}", mark * round(_BAR * held / scale)])
    lines = [_marked("memory of a chip", plan), *aligned(rows, left=(0, 3))]
    if size(sum(sizes.values())) != size(memory.used):
        lines += _wrapped(
            f"The parts add up to {size(sum(sizes.values()))}; laid out, they take {size(memory.used)}.", "  "
        )
    return lines


def _speed(plan: Plan) -> list[str]:
    figures = plan.figures
    if figures is None:
        return [] if plan.memory.fits else ["no step time: it does not fit"]
    least, most = ("", "") if plan.compiled else ("at least ", "at most ")
    step = f"{least}{duration(figures.step_seconds)}"
    bound = f" ESTIMATE; upper bound {duration(figures.upper_bound_seconds)} (nothing overlaps)"
    step += bound if plan.compiled else ""
    square = f"{most}{figures.mfu_full_square:.1%} full-square"
    # Of the bfloat16 peak: effective where products are in 8 bits.
    name = "EMFU" if plan.settings.get("precision") == "int8" else "MFU"
    rows = [["step", step], [name, f"{most}{figures.mfu:.1%} causal, {square}"]]
    rows.append(["tokens/s/chip", f"{most}{figures.tokens_per_second:,.0f}"])
    rows.append(["tokens per dollar", f"{most}{count(figures.tokens_per_dollar)}"])
    rows.append(["dollars per hour", f"{figures.dollars_per_hour:,.2f} ({plan.num_chips:,} x {figures.price:.2f})"])
    if figures.tokens is not None and figures.days is not None and figures.dollars is not None:
        cost = f"{least}{figures.days:,.1f} days, {least}{figures.dollars:,.0f} dollars"
        rows.append([f"{count(figures.tokens)} tokens", cost])
    heading = "speed, an ESTIMATE: from the compiled program, nothing was measured"
    lines = [heading if plan.compiled else _marked("speed", plan), *aligned(rows, left=(0, 1))]
    return lines + _wrapped(f"Price list of {figures.price_date}: {figures.price_source}", "  ")


def _parts(estimate: Estimate) -> list[str]:
    rows = []
    for name, seconds in estimate.parts.items():
        share = seconds / estimate.seconds if estimate.seconds else 0.0
        rows.append([name, duration(seconds), f"{share:.1%}", "#" * round(_BAR * share)])
    return ["where the time goes (ESTIMATE)", *aligned(rows, left=(0, 3))]


def _collectives(estimate: Estimate) -> list[str]:
    rows = [["kind", "axis", "count", "bytes", "time", "overlaps"]]
    for entry in estimate.collectives:
        sizes = [f"{entry.count:,}", size(entry.num_bytes), duration(entry.seconds)]
        rows.append([entry.kind, entry.axis, *sizes, "yes" if entry.overlaps else "no"])
    heading = "traffic between chips (whole tensors, links at their nominal speed)"
    return [heading, *aligned(rows, left=(0, 1, 5))] if estimate.collectives else []


def _matmuls(estimate: Estimate) -> list[str]:
    rows = [["time", "ideal", "of ideal", "times", "shape", "source"]]
    for entry in estimate.matmuls[:_MATMULS]:
        efficiency = f"{entry.ideal_seconds / entry.seconds:.0%}" if entry.seconds else "-"
        times = [duration(entry.seconds), duration(entry.ideal_seconds), efficiency, f"{entry.count:,}"]
        rows.append([*times, _largest_array(entry.shape), entry.source or entry.name])
    heading = f"matmuls that lose most against the chip's peak ({len(rows) - 1} of {len(estimate.matmuls)})"
    return [heading, *aligned(rows, left=(4, 5))] if estimate.matmuls else []


def _largest_array(shape: str) -> str:
    """Of a fusion's results, in HLO's notation without their layout."""
    array = max(arrays(shape), key=lambda one: one.num_elements)
    return f"{array.dtype}[{','.join(map(str, array.dims))}]"


def _largest(memory: HbmUse) -> list[str]:
    rows = [["bytes", "shape", "source"]]
    rows += [[size(entry.num_bytes), _cut(entry.shape, 40), entry.source] for entry in memory.largest]
    return ["largest temporaries", *aligned(rows, left=(1, 2))] if memory.largest else []


def _compared(plan: Plan, is_best: bool, length: int) -> list[str]:
    """A comparison's row of so many cells."""
    memory, figures = plan.memory, plan.figures
    fits = "yes" if plan.compiled else "maybe"
    fits = fits if memory.fits else f"{gib(memory.used - memory.available)} over"
    mark = ("*" if is_best else "") + ("" if plan.compiled else "~")
    row = [mark, plan.topology, f"{plan.num_chips:,}", f"{gib(memory.used)}/{gib(memory.available)}", fits]
    if memory.fits and figures is not None:
        row += [f"{figures.step_seconds:.3f}", f"{figures.mfu:.3f}", f"{figures.tokens_per_second:,.0f}"]
        row.append(count(figures.tokens_per_dollar, short=True))
        if figures.days is not None and figures.dollars is not None:
            row += [f"{figures.days:,.1f}", f"{figures.dollars:,.0f}"]
    return row + ["-"] * (length - len(row))


def _best(plans: Sequence[Plan]) -> Plan | None:
    able = [plan for plan in plans if plan.memory.fits and plan.figures is not None]
    able = [plan for plan in able if plan.compiled] or able
    return max(able, key=lambda plan: plan.figures.tokens_per_dollar, default=None)


def _differences(plans: Sequence[Plan]) -> list[str]:
    """What tells each plan from the others, if the slice does not."""
    sets = [{"config": plan.config, "mesh": _pairs(plan.mesh), **plan.settings} for plan in plans]
    if len({plan.topology for plan in plans}) == len(plans) and len({plan.config for plan in plans}) == 1:
        return [""] * len(plans)
    names = [name for name in sets[0] if any(other.get(name) != sets[0][name] for other in sets)] if sets else []
    return [", ".join(f"{name} {values.get(name)}" for name in names) for values in sets]


def _marked(heading: str, plan: Plan) -> str:
    return heading if plan.compiled else f"{heading} ({BOUNDS})"


def _pairs(values: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items())


def _bullets(heading: str, items: Sequence[str]) -> list[str]:
    lines = [line for item in items for line in _wrapped(item, "    ", "  - ")]
    return [heading, *lines] if lines else []


def _wrapped(line: str, indent: str = "", first: str | None = None) -> list[str]:
    return textwrap.wrap(
        line,
        _WIDTH,
        initial_indent=indent if first is None else first,
        subsequent_indent=indent,
        break_on_hyphens=False,
    )


def _cut(line: str, width: int) -> str:
    return line if len(line) <= width else f"{line[: width - 3]}..."


def _ascii(block: str) -> str:
    return block.encode("ascii", "replace").decode()
