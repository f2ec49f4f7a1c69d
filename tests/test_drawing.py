"""Figures look the same whatever the user's theme, and leave the user's settings alone."""

from __future__ import annotations

import subprocess
import sys

import matplotlib as mpl
from matplotlib.colors import same_color

from gemma_xla.drawing import COLOURS, INK, PAPER, label, legend, new_figure
from gemma_xla.train.metrics import draw

DARK = {"figure.facecolor": "black", "axes.facecolor": "black", "text.color": "white", "axes.labelcolor": "white"}


def test_black_on_white_in_a_dark_theme():
    with mpl.rc_context({**DARK, "axes.edgecolor": "white", "xtick.color": "white"}):
        figure, ((axes,),) = new_figure(3, 2, "a $name")
        axes.plot([1, 2], [1, 2], label="line")
        label(axes, "title", "x", "y")
        legend(axes)
        figure.canvas.draw()
    assert same_color(figure.get_facecolor(), PAPER) and same_color(axes.get_facecolor(), PAPER)
    words = [figure._suptitle, axes.xaxis.label, axes.yaxis.label, *axes.get_xticklabels(), *axes.legend_.get_texts()]
    assert all(same_color(word.get_color(), INK) for word in words)
    assert all(same_color(spine.get_edgecolor(), INK) for spine in axes.spines.values())


def test_the_grid_has_the_shape_asked_for():
    assert new_figure(3, 2)[1].shape == (1, 1)
    assert new_figure(3, 2, rows=2, columns=3)[1].shape == (2, 3)
    assert len(set(COLOURS)) == len(COLOURS)


def test_loss_and_mfu():
    records = [
        {"step": 1, "loss": 3.0, "mfu": 0.25},
        {"step": 1, "eval_loss": 2.5},
        {"step": 2, "loss": 2.0, "mfu": 0.5},
    ]
    loss, mfu = draw(records, "a run").axes
    training, held_out = loss.lines
    assert list(training.get_ydata()) == [3.0, 2.0] and list(held_out.get_ydata()) == [2.5]
    assert list(mfu.lines[0].get_ydata()) == [25.0, 50.0]


def test_a_notebooks_backend_stays_as_it_is(tmp_path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom gemma_xla.train.metrics import plot\n"
        f"plot([{{'step': 1, 'loss': 1.0, 'mfu': 0.1}}], Path({str(tmp_path / 'curves.png')!r}), 'a run')\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "curves.png").stat().st_size > 1000
