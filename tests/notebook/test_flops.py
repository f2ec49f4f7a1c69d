"""Pictures of FLOPs and MFU show the counter's figures."""

from __future__ import annotations

import pytest

from gemma_xla.errors import UserError
from gemma_xla.flops import FlopCounter
from gemma_xla.model.config import preset
from gemma_xla.notebook.flops import draw_lengths, draw_mfu, draw_terms, grouped

MODEL = preset("gemma-2b")
FULL, LORA = FlopCounter(MODEL, 8192), FlopCounter(MODEL, 8192, lora_rank=16)


@pytest.mark.parametrize("counter", [FULL, LORA])
@pytest.mark.parametrize("causal", [True, False])
def test_groups_add_up_to_the_counters_total(counter, causal):
    groups = grouped(counter, causal)
    assert sum(groups.values()) == pytest.approx(counter.per_token(causal=causal), rel=1e-12)
    assert ("adapters" in groups) == (counter is LORA)


def test_a_bar_is_as_long_as_its_counters_total():
    figure = draw_terms({"full": (FULL, True), "square": (FULL, False), "LoRA": (LORA, True)})
    (axes,) = figure.axes
    ends = [max(bar[i].get_x() + bar[i].get_width() for bar in axes.containers) for i in range(3)]
    expected = [FULL.per_token() / 1e9, FULL.per_token(causal=False) / 1e9, LORA.per_token() / 1e9]
    assert ends == pytest.approx(expected)
    assert [text.get_text() for text in axes.texts] == ["16.85", "18.66", "11.95"]
    # Nothing reaches the edge of the picture.
    assert axes.get_xlim()[1] > max(ends)


def test_shares_by_length():
    (axes,) = draw_lengths(MODEL, [1024, 8192]).axes
    square, causal = (line.get_ydata() for line in axes.lines)
    # 14.843 of 138.023 TFLOP per sequence; the square has twice as much attention.
    assert causal[1] == pytest.approx(100 * 14.843 / 138.023, rel=1e-4)
    assert square[1] == pytest.approx(100 * 2 * 14.843 / (138.023 + 14.843), rel=1e-4)
    with pytest.raises(UserError, match="seq_len is 16384"):
        draw_lengths(MODEL, [16384])


def test_mfu_is_the_median_of_steps():
    steps = [{"mfu": m, "mfu_full_square": 2 * m, "mfu_real_tokens": m / 2} for m in (0.1, 0.2, 0.6)]
    figure = draw_mfu({"one": [{"step": 0, "eval_loss": 5.0}, *steps], "two": steps[:1]})
    assert [text.get_text() for text in figure.axes[0].texts] == ["20.0", "40.0", "10.0", "10.0", "20.0", "5.0"]
    with pytest.raises(UserError, match="'none' has no steps"):
        draw_mfu({"none": [{"step": 0, "eval_loss": 5.0}]})
