"""A sweep is the plans of arithmetic, one for each combination, and its picture says what they say."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from gemma_xla.config_file import load_config
from gemma_xla.errors import UserError
from gemma_xla.plan.arithmetic import bounds
from gemma_xla.plan.setup import prepare
from gemma_xla.plan.slices import hardware
from gemma_xla.plan.sweep import dollars_per_billion_tokens, draw_sweep, sweep

CONFIG = Path(__file__).parents[2] / "recipes/configs/gemma-2b-pretrain-v5e-256.yaml"


@pytest.fixture(scope="module")
def config():
    return load_config(CONFIG)


@pytest.fixture(scope="module")
def plans(config):
    return sweep(config, "gemma-2b", ["v5e-16", "v5p-128"], [1, 4], tokens=1e9)


def test_each_combination_is_planned_as_its_own_config_would_be(config, plans):
    settings = [(p.topology, p.settings["remat"], p.settings["batch_size_per_device"]) for p in plans]
    slices = ("v5e-16", "v5p-128")
    assert settings == [(s, remat, rows) for s in slices for remat in ("full", "none") for rows in (1, 4)]
    last = load_config(CONFIG, ["train.batch_size_per_device=4", "train.remat=none"])
    memory, seconds = bounds(prepare(last, hardware(last, "v5p-128")))
    assert plans[-1].memory == memory
    assert plans[-1].figures.step_seconds == seconds
    assert not any(plan.compiled for plan in plans)


def test_dollars_are_those_of_the_tokens_asked_for(plans):
    for plan in plans:
        assert plan.figures.tokens == 1e9
        assert dollars_per_billion_tokens(plan) == pytest.approx(plan.figures.dollars)
    assert dollars_per_billion_tokens(dataclasses.replace(plans[0], figures=None)) is None


def test_the_picture_says_what_fits_and_which_is_cheapest(plans):
    figure = draw_sweep(plans)
    (axes,) = figure.axes
    said = [text.get_text() for text in axes.texts]
    assert len(said) == len(plans) == len(axes.patches)
    assert [" over" in words for words in said] == [not plan.memory.fits for plan in plans]
    fitting = [plan for plan in plans if plan.memory.fits]
    assert 0 < len(fitting) < len(plans)
    best = min(fitting, key=dollars_per_billion_tokens)
    colours = [patch.get_facecolor() for patch in axes.patches]
    assert [colours.count(colour) for colour in colours].index(1) == plans.index(best)
    assert f"${dollars_per_billion_tokens(best):.2f}" in said[plans.index(best)]
    assert "bounds, not an estimate" in figure.get_suptitle()


def test_mistakes(config):
    with pytest.raises(UserError, match="no slice is called 'v5e-17'"):
        sweep(config, "gemma-2b", ["v5e-17"], [1])
    with pytest.raises(UserError, match="there are none to draw"):
        draw_sweep([])
