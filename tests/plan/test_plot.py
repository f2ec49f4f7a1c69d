"""The picture: what is in it, and that a file appears whole or not at all."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from gemma_xla.errors import UserError
from gemma_xla.plan.plot import draw, memory_bar, plot, time_bar
from gemma_xla.plan.result import HbmUse
from tests.plan.test_report import ESTIMATE, MEMORY, TIGHT, UNCOMPILED, make_plan


def words(figure: Figure) -> str:
    texts = [figure.get_suptitle()]
    for axes in figure.axes:
        texts += [axes.get_title(loc="left"), *(text.get_text() for text in axes.texts)]
    return "\n".join(texts)


def test_memory_parts_fill_what_is_available():
    parts = memory_bar(MEMORY)
    names = ["parameters", "optimizer", "batch", "temporaries", "program", "free"]
    assert [part.name for part in parts] == names
    assert sum(part.size for part in parts) == pytest.approx(15.75)
    assert parts[3].label == "6.00 GiB"
    assert "free" not in [part.name for part in memory_bar(TIGHT.memory)]
    assert sum(part.size for part in memory_bar(TIGHT.memory)) == pytest.approx(20.9)


def test_time_parts_are_the_estimates():
    parts = time_bar(ESTIMATE)
    assert {part.name: part.size for part in parts} == ESTIMATE.parts
    assert [part.label for part in parts] == ["64.1%", "24.0%", "8.0%", "3.9%"]
    assert len({part.colour for part in parts}) == 4


def test_it_says_what_it_is_of_and_that_it_is_an_estimate():
    said = words(draw(make_plan()))
    assert "gemma-2b-pretrain-v5e-256.yaml on v5e-256 (256 chips)" in said
    for part in ("ESTIMATE", "fits: 6.12 of 15.75 GiB", "MFU 56.1%", "temporaries\n6.00 GiB", "upper bound 1.6 s"):
        assert part in said


def test_what_does_not_fit_or_is_arithmetic_says_so():
    said = words(draw(TIGHT))
    assert "does not fit: 20.90 of 15.75 GiB, 5.15 GiB too much" in said
    assert "upper bound" not in said
    said = words(draw(UNCOMPILED))
    assert "arithmetic only: bounds, not an estimate" in said
    assert "ESTIMATE" not in said


# Narrow parts at both ends.
CROWDED = make_plan(
    memory=HbmUse(2**34, 2**28, 2**28, 2**28, 2**28, 2**33, 2**28, 2**34 + 2**33, []),
    estimate=dataclasses.replace(
        ESTIMATE,
        seconds=1.3,
        upper_bound_seconds=1.31,
        parts={"matmuls": 1.2, "attention": 0.03, "other": 0.03, "collectives": 0.03, "waiting": 0.01},
    ),
)


@pytest.mark.parametrize("plan", [make_plan(), TIGHT, UNCOMPILED, CROWDED])
def test_no_words_overlap_or_leave_the_picture(plan):
    figure = draw(plan)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    for axes in figure.axes:
        # Without the lines that lead from them to narrow parts.
        boxes = [Text.get_window_extent(text) for text in axes.texts]
        for i, box in enumerate(boxes):
            assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
            assert not any(box.overlaps(other) for other in boxes[:i])


def test_the_background_is_opaque_white(tmp_path: Path):
    plot(make_plan(), tmp_path / "plan.png")
    image = imread(tmp_path / "plan.png")
    assert np.all(image[0, 0] == 1.0)
    assert image[..., -1].min() == 1.0 if image.shape[-1] == 4 else True
    assert [path.name for path in tmp_path.iterdir()] == ["plan.png"]


@pytest.mark.parametrize("name", ["plan.svg", "plan.PDF"])
def test_other_kinds(tmp_path: Path, name: str):
    plot(make_plan(), str(tmp_path / name))
    assert (tmp_path / name).read_bytes()[:5] in (b"<?xml", b"%PDF-")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("plan.pngg", "did you mean 'png'"),
        ("plan", "has no ending"),
        ("missing/plan.png", "there is no folder"),
        ("folder.png", "is a folder"),
    ],
)
def test_a_bad_path_is_one_line_and_leaves_nothing(tmp_path: Path, name: str, says: str):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match=says) as caught:
        plot(make_plan(), tmp_path / name)
    assert str(caught.value).startswith("--plot: ")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_an_interrupted_write_keeps_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "plan.png"
    path.write_text("before")

    def fail(figure: Figure, target: Path, **_: object) -> None:
        Path(target).write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(UserError, match="--plot: .* No space left on device"):
        plot(make_plan(), path)
    assert path.read_text() == "before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.png"]


def test_dollar_signs_in_a_name_are_no_formula(tmp_path: Path):
    plot(dataclasses.replace(make_plan(), config="a$b_{$.yaml"), tmp_path / "plan.png")
