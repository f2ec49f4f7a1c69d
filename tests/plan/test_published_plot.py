"""The picture of the published speeds: measured beside ours, which is an estimate or a bound, and says so."""

from __future__ import annotations

from gemma_xla.plan.published import PUBLISHED
from gemma_xla.plan.published_plot import draw_published
from tests.plan.test_report import TIGHT, UNCOMPILED, make_plan


def bars(plans):
    """Lengths of each row's bars by their kind: those with hatching are bounds."""
    (axes,) = draw_published(plans).axes
    rows: dict[int, list[tuple[bool, float]]] = {place: [] for place in range(len(PUBLISHED))}
    for patch in (patch for patch in axes.patches if patch.get_width()):
        place = round(patch.get_y() + patch.get_height() / 2)
        rows[place].append((bool(patch.get_hatch()), round(float(patch.get_width()), 6)))
    return rows


def test_each_row_has_what_was_published_and_ours_by_its_kind():
    keys = [row.key for row in PUBLISHED]
    compiled = make_plan()
    found = bars({keys[0]: compiled, keys[1]: UNCOMPILED, keys[2]: TIGHT, keys[3]: None})
    assert [row[0] for row in found.values()] == [(False, round(100 * row.mfu, 6)) for row in PUBLISHED]
    assert found[0][1:] == [(False, round(100 * compiled.figures.mfu_full_square, 6))]
    assert found[1][1:] == [(True, round(100 * UNCOMPILED.figures.mfu_full_square, 6))]
    # What does not fit, or was not planned, has no speed.
    assert found[2][1:] == found[3][1:] == []


def test_it_explains_its_colours():
    (axes,) = draw_published({}).axes
    explained = [text.get_text() for text in axes.legend_.get_texts()]
    assert len(explained) == 3
    assert any("ESTIMATE" in words for words in explained) and any("bound" in words for words in explained)
