"""How every figure looks: black on opaque white whatever the viewer's theme, in colours that all can tell apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which the colour-blind can tell apart (https://jfly.uni-koeln.de/color/).
BLUE, ORANGE, GREEN, YELLOW, SKY, PURPLE, RED = (
    *("#0072B2", "#E69F00", "#009E73", "#F0E442", "#56B4E9", "#CC79A7", "#D55E00"),
)
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED, YELLOW)
INK, PAPER = "black", "white"


def new_figure(
    width: float, height: float, title: str = "", *, rows: int = 1, columns: int = 1
) -> tuple[Figure, np.ndarray]:
    """Return an empty figure, and its axes ``[rows, columns]``.

    It does not go through pyplot: a notebook's, or a user's, own settings stay as they are, and so does the figure.

    Args:
        width, height: inches.
    """
    figure = Figure(figsize=(width, height), layout="constrained", facecolor=PAPER)
    FigureCanvasAgg(figure)
    if title:
        # A name may have dollar signs, which are no formula.
        figure.suptitle(title, color=INK, parse_math=False)
    axes = figure.subplots(rows, columns, squeeze=False)
    for one in axes.flat:
        _on_paper(one)
    return figure, axes


def label(axes: Axes, title: str = "", x: str = "", y: str = "") -> None:
    """Say what is drawn."""
    axes.set_title(title, loc="left", fontsize=10, color=INK, parse_math=False)
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)


def legend(axes: Axes, **options: object) -> None:
    """Explain colours and marks."""
    axes.legend(facecolor=PAPER, edgecolor="lightgray", labelcolor=INK, fontsize=9, **options)


def at_end(axes: Axes, x: float, y: float | str, words: str) -> None:
    """Write what a bar comes to beside its end."""
    axes.annotate(words, (x, y), (4, 0), textcoords="offset points", va="center", fontsize=9, color=INK)


def _on_paper(axes: Axes) -> None:
    axes.set_facecolor(PAPER)
    axes.tick_params(colors=INK, labelsize=9)
    axes.spines[:].set_color(INK)
    axes.spines[["right", "top"]].set_visible(False)
