"""What `remat: auto` keeps, by the memory that there is."""

from __future__ import annotations

import dataclasses

import pytest

from gemma_xla.chips import CHIPS
from gemma_xla.config_file import load_config
from gemma_xla.plan.setup import prepare
from gemma_xla.plan.slices import hardware
from gemma_xla.temporaries import choose_remat, kept_choices, temporaries
from tests.plan.setups import a_setup

GATE = {"attention": "all", "gate_proj": "all"}
LAYER = ["train.layers=scan", "train.remat=auto"]


@pytest.mark.parametrize(
    ("config", "changes", "remat", "keep"),
    [
        ("gemma-2b-pretrain-v5e-256", [], "full", GATE),
        ("gemma-7b-pretrain-v5e-256", [], "full", {"attention": "all"}),
        ("gemma-2b-pretrain-v5p-128", [], "none", {}),
        ("gemma-7b-pretrain-v5p-128", [], "none", {}),
        ("gemma-2b-pretrain-v5e-256", ["train.batch_size_per_device=4"], "full", {}),
        ("gemma-2b-pretrain-v5e-256", ["data.seq_len=1024"], "none", {}),
        # Computing again in 8 bits is no slower than fetching.
        ("gemma-7b-pretrain-v5p-128", ["train.precision=int8"], "full", {"attention": "all"}),
        # Of layers that are a loop in Python nothing is kept by name.
        ("gemma-2b-pretrain-v5e-256", ["train.layers=loop"], "full", {}),
    ],
)
def test_as_much_is_kept_as_there_is_room_for(config, changes, remat, keep):
    given = load_config(f"recipes/configs/{config}.yaml", ["train.remat=auto", "train.keep={}", *changes])
    setup = prepare(given, hardware(given)).resolved()
    assert (setup.config.train.remat, setup.config.train.keep) == (remat, keep)
    # Nothing else changes.
    back = setup.config.train.model_copy(update={"remat": "auto", "keep": {}})
    assert setup.config.model_copy(update={"train": back}) == given


@pytest.mark.parametrize("precision", ["default", "int8"])
def test_where_there_is_no_memory_of_its_own_nothing_is_computed_twice(precision):
    train = choose_remat(a_setup(*LAYER, f"train.precision={precision}").step, None)
    assert (train.remat, train.keep) == ("none", {})


def test_what_was_chosen_stays():
    step = a_setup("train.remat=full").step
    step = dataclasses.replace(step, train=step.train.model_copy(update={"keep": {"o_proj": 2}}))
    assert choose_remat(step, CHIPS["v5p"].hbm_bytes) == step.train


@pytest.mark.parametrize("layers", ["scan", "loop"])
def test_choices_keep_less_and_less(layers):
    step = a_setup(f"train.layers={layers}", "train.remat=full").step
    sizes = [
        temporaries(dataclasses.replace(step, train=step.train.model_copy(update=choice)), frugal=False)
        for choice in kept_choices(step.train)
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 1
