"""What follows from a step's time, against figures worked out by hand."""

from __future__ import annotations

import pytest

from gemma_xla.errors import UserError
from gemma_xla.plan.figures import figures
from tests.plan.setups import a_setup

# FLOPs of a sequence of 8192 tokens through Gemma 2B: six per parameter in a matrix and token, and attention's.
SQUARE = 3 * 18 * 4 * 8 * 256 * 8192**2
CAUSAL, FULL_SQUARE = 6 * 2_506_096_640 * 8192 + SQUARE / 2, 6 * 2_506_096_640 * 8192 + SQUARE


def test_a_step_of_gemma_2b_by_hand():
    # 256 chips, a row of 8192 each, in 2 s: 4096 tokens per second and chip, at 1.20 dollars.
    found = figures(a_setup(), 2.0, 2.5, tokens=6e12)
    assert (found.step_seconds, found.upper_bound_seconds) == (2.0, 2.5)
    assert found.tokens_per_second == 4096
    assert found.mfu == pytest.approx(CAUSAL / 2 / 197e12, rel=1e-9)
    assert found.mfu_full_square == pytest.approx(FULL_SQUARE / 2 / 197e12, rel=1e-9)
    assert found.dollars_per_hour == pytest.approx(307.2)
    assert found.tokens_per_dollar == pytest.approx(4096 * 3600 / 1.2)
    # 6e12 tokens at 1,048,576 per second: 66.2 days.
    assert found.days == pytest.approx(6e12 / 1_048_576 / 86400)
    assert found.dollars == pytest.approx(found.days * 24 * 307.2)
    assert "us-east5" in found.price_source


def test_without_tokens_those_of_the_runs_steps_count():
    assert figures(a_setup("train.steps=1000"), 2.0, 2.0).tokens == 1000 * 256 * 8192
    found = figures(a_setup("train.steps=null", "train.epochs=1"), 2.0, 2.0)
    assert (found.tokens, found.days, found.dollars) == (None, None, None)


def test_micro_batches_and_slices_count():
    one = figures(a_setup(), 2.0, 2.0)
    two = figures(a_setup("mesh.data=2", "train.grad_accum=3", topology="2xv5e-256"), 6.0, 6.0)
    assert two.tokens_per_second == pytest.approx(one.tokens_per_second)
    assert two.tokens_per_dollar == pytest.approx(one.tokens_per_dollar)
    assert two.dollars_per_hour == 2 * one.dollars_per_hour


def test_the_users_price():
    found = figures(a_setup("hardware.price=0.6"), 2.0, 2.0)
    assert (found.price, found.price_source) == (0.6, "set by the user")
    with pytest.raises(UserError, match="hardware.price is 0; set it above 0"):
        figures(a_setup("hardware.price=0"), 2.0, 2.0)
