"""A plan as a picture: what fills a chip's memory, and what a step's time goes to."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import Rectangle

from gemma_xla.drawing import BLUE, GREEN, INK, ORANGE, PAPER, PURPLE, RED, SKY, YELLOW, label, new_figure
from gemma_xla.errors import UserError, nearest
from gemma_xla.plan.report import BOUNDS, answer, memory_parts
from gemma_xla.plan.units import GIB, gib
from gemma_xla.storage import reason

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from gemma_xla.plan.result import Estimate, HbmUse, Plan

_MEMORY_COLOURS = {
    "parameters": BLUE,
    "optimizer": ORANGE,
    "gradients": GREEN,
    "batch": YELLOW,
    "temporaries": SKY,
    "program": PURPLE,
    "other": RED,
    "free": PAPER,
}
_TIME_COLOURS = {"matmuls": BLUE, "attention": SKY, "other": ORANGE, "collectives": PURPLE, "waiting": RED}
# Of the axis: a label needs this much to stand inside its part.
_ROOM = 0.11


class Part(NamedTuple):
    """A piece of a bar."""

    name: str
    size: float
    label: str
    colour: str


def plot(plan: Plan, path: str | Path) -> None:
    """Draw memory and time as a picture of the kind that the file's name ends with.

    Raises:
        UserError: the file cannot be written; nothing of it is left then.
    """
    path = Path(path)
    check_path(path)
    figure = draw(plan)
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=path.suffix, delete=False) as file:
            temporary = Path(file.name)
        figure.savefig(temporary, dpi=150, facecolor=PAPER)
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"--plot: {path} cannot be written: {reason(error)}; give another file") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def check_path(path: Path) -> None:
    """
    Raises:
        UserError: no picture can be written there.
    """
    kinds = sorted(FigureCanvasAgg.filetypes)
    kind = path.suffix.lower().removeprefix(".")
    if kind not in kinds:
        ending = f"ends in {path.suffix!r}{nearest(kind, kinds)}" if kind else "has no ending"
        raise UserError(f"--plot: {path} {ending}; the ending says what to write, one of {', '.join(kinds)}")
    if not path.parent.is_dir():
        raise UserError(f"--plot: {path} cannot be written: there is no folder {path.parent}; create it first")
    if path.is_dir():
        raise UserError(f"--plot: {path} is a folder; give the name of a file")


def draw(plan: Plan) -> Figure:
    """The picture, on white whatever the viewer's background."""
    bars = [_draw_memory] if plan.estimate is None else [_draw_memory, _draw_time]
    kind = "ESTIMATE: nothing was measured" if plan.compiled else BOUNDS
    title = f"{plan.config} on {plan.topology} ({plan.num_chips:,} chips)\n{kind}"
    figure, grid = new_figure(10, 0.8 + 2.2 * len(bars), title, rows=len(bars))
    for axes, bar in zip(grid[:, 0], bars, strict=True):
        axes.set(ylim=(-0.5, 1.35), yticks=[])
        axes.spines["left"].set_visible(False)
        bar(axes, plan)
    return figure


def _draw_memory(axes: Axes, plan: Plan) -> None:
    memory = plan.memory
    label(axes, f"memory of a chip: {answer(plan)}", "GiB")
    parts = memory_bar(memory)
    _stack(axes, parts)
    if not memory.fits:
        over = sum(part.size for part in parts) - memory.available / GIB
        hatched = Rectangle((memory.available / GIB, -0.45), over, 0.9)
        hatched.set(facecolor="none", edgecolor=INK, hatch="///", linewidth=0.0)
        axes.add_patch(hatched)
    _line(axes, memory.available / GIB, f"{gib(memory.available)} GiB available")


def memory_bar(memory: HbmUse) -> list[Part]:
    """The bar of memory in GiB: what is used, then what is free."""
    sizes = {**memory_parts(memory), "free": memory.available - memory.used}
    return [
        Part(name, size / GIB, f"{gib(size)} GiB", _MEMORY_COLOURS[name]) for name, size in sizes.items() if size > 0
    ]


def _draw_time(axes: Axes, plan: Plan) -> None:
    estimate = plan.estimate
    title = f"step: ESTIMATE {estimate.seconds:.4g} s"
    title += f"; MFU {plan.figures.mfu:.1%} (causal)" if plan.figures else ""
    label(axes, title, "seconds")
    _stack(axes, time_bar(estimate))
    _line(axes, estimate.upper_bound_seconds, f"upper bound {estimate.upper_bound_seconds:.4g} s")


def time_bar(estimate: Estimate) -> list[Part]:
    """The bar of time in seconds."""
    shares = {name: seconds / estimate.seconds for name, seconds in estimate.parts.items() if seconds > 0}
    return [
        Part(name, estimate.parts[name], f"{share:.1%}", _TIME_COLOURS.get(name, YELLOW))
        for name, share in shares.items()
    ]


def _stack(axes: Axes, parts: Sequence[Part]) -> None:
    """Draw a bar with each part's name and size in it or, where it is too narrow, above it in a row of their own."""
    length = 1.18 * sum(part.size for part in parts)
    axes.set_xlim(0, length)
    start, narrow = 0.0, []
    for part in parts:
        axes.barh(0, part.size, left=start, height=0.9, color=part.colour, edgecolor=INK, linewidth=0.6)
        middle, words = start + part.size / 2, f"{part.name}\n{part.label}"
        if part.size > _ROOM * length:
            ink = PAPER if part.colour == BLUE else INK
            box = {"facecolor": part.colour, "edgecolor": "none", "pad": 1.0}
            axes.text(middle, 0, words, ha="center", va="center", fontsize=9, color=ink, bbox=box)
        else:
            narrow.append((middle, words))
        start += part.size
    arrow = {"arrowstyle": "-", "color": INK, "linewidth": 0.6, "relpos": (0.5, 0.0), "shrinkA": 1.0}
    style = {"ha": "center", "va": "bottom", "fontsize": 9, "color": INK, "arrowprops": arrow}
    places = _spread([middle for middle, _ in narrow], _ROOM * length, length)
    for (middle, words), place in zip(narrow, places, strict=True):
        axes.annotate(words, (middle, 0.45), (place, 0.85), **style)


def _spread(middles: Sequence[float], room: float, length: float) -> list[float]:
    """Places in order, as near to these as they can be while each has its room and none leaves the axis."""
    places: list[float] = []
    for middle in middles:
        places.append(max(middle, places[-1] + room if places else room / 2))
    last = length - room / 2
    for i in reversed(range(len(places))):
        places[i] = min(places[i], last)
        last = places[i] - room
    return places


def _line(axes: Axes, at: float, label: str) -> None:
    """Mark a place on the axis."""
    axes.set_xlim(0, max(axes.get_xlim()[1], 1.18 * at))
    axes.axvline(at, ymax=0.52, color=INK, linestyle="--", linewidth=1.2)
    box = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.0}
    axes.annotate(label, (at, -0.42), (4, 0), textcoords="offset points", fontsize=9, color=INK, va="bottom", bbox=box)
