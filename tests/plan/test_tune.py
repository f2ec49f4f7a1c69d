"""Tuning against planning every candidate, with an oracle in the compiler's place."""

from __future__ import annotations

import dataclasses
import shlex

import pytest

from gemma_xla.config_file import load_config
from gemma_xla.errors import UserError
from gemma_xla.plan.arithmetic import bounds
from gemma_xla.plan.figures import figures
from gemma_xla.plan.result import Plan
from gemma_xla.plan.settings import Variants, settings_of
from gemma_xla.plan.setup import prepare
from gemma_xla.plan.slices import hardware
from gemma_xla.plan.tune import _candidates, tune
from gemma_xla.plan.tune_report import launch_command, text
from tests.plan.setups import LORA, a_config


class Oracle:
    """Plans with memory and times at a multiple of their bounds that differs from candidate to candidate."""

    def __init__(self, excess: float = 2.0, compiled: bool = True) -> None:
        self.excess, self.compiled, self.asked = excess, compiled, []

    def __call__(self, config, where) -> Plan:
        setup = prepare(config, where)
        self.asked.append(settings_of(config, where))
        floor, least = bounds(setup)
        temporaries = int(floor.temporaries * self.excess)
        memory = dataclasses.replace(floor, temporaries=temporaries, used=floor.used - floor.temporaries + temporaries)
        # Larger batches run better, and the data axis costs something.
        seconds = least * (1.2 + 0.1 / self.asked[-1].batch_size_per_device + 0.02 * where.slice_mesh.data)
        return Plan(
            config="", topology=where.name, chip=where.chip.name, num_chips=where.num_chips,
            mesh=dataclasses.asdict(where.mesh), settings={}, rows=setup.rows,
            tokens_per_step=setup.rows * setup.flops.seq_len, compiled=self.compiled, memory=memory, estimate=None,
            figures=figures(setup, seconds, seconds) if memory.fits else None, advice=[], notes=[], versions={},
        )  # fmt: skip


def slices(config, *names):
    return [hardware(config, name) for name in names]


def run(config, *names, ask=None, **options):
    lines = []
    tuning = tune(config, slices(config, *names), ask or Oracle(), say=lines.append, **options)
    return tuning, lines


# Few layers: each plan makes all parameters once, without values.
SHALLOW = "model.overrides.num_hidden_layers=2"
SMALL = a_config(SHALLOW, "train.batch_size=32", "train.batch_size_per_device=null", lora=LORA)


def everything(config, name, ask):
    """All candidates, planned one by one."""
    where, variants, plans = hardware(config, name), Variants(config), {}
    for settings in _candidates(settings_of(config, where), where, Variants(config).kept_choices):
        try:
            setup = variants.setup(settings)
        except UserError:
            continue
        plans[settings] = ask(setup.config, setup.hardware)
    return plans


@pytest.mark.parametrize(("name", "excess"), [("v5e-8", 2.0), ("v5e-8", 6.0), ("v5p-8", 2.0)])
def test_pruning_loses_nothing(name, excess):
    plans = everything(SMALL, name, Oracle(excess))
    fitting = {settings: plan for settings, plan in plans.items() if plan.memory.fits}
    tuning, _ = run(SMALL, name, ask=Oracle(excess), finalists=1000)
    assert {row.settings for row in tuning.rows if row.fits} == set(fitting)
    best = max(plan.figures.tokens_per_dollar for plan in fitting.values())
    assert tuning.winner.plan.figures.tokens_per_dollar == best
    speeds = [row.plan.figures.tokens_per_dollar for row in tuning.rows if row.fits]
    assert speeds == sorted(speeds, reverse=True)
    # Something was saved: what cannot fit was not asked for, and all are accounted for.
    assert len(tuning.rows) + sum(tuning.pruned.values()) == len(
        list(_candidates(tuning.base[0], hardware(SMALL, name), Variants(SMALL).kept_choices))
    )
    if excess > 2:
        assert len(tuning.rows) < len(plans)


def test_what_was_seen_not_to_fit_is_learnt_from():
    # At six times the bound little fits. A few questions suffice to find something that does, and the best comes early.
    ask = Oracle(6.0)
    tuning, _ = run(SMALL, "v5e-8", ask=ask, finalists=6)
    assert tuning.winner is not None
    failed = [row.settings for row in tuning.rows if not row.fits]
    for early, late in ((a, b) for i, a in enumerate(ask.asked) for b in ask.asked[i + 1 :] if a in failed):
        same_mesh = (early.data, early.fsdp, early.tensor) == (late.data, late.fsdp, late.tensor)
        larger = late.batch_size_per_device >= early.batch_size_per_device and late.grad_accum >= early.grad_accum
        keeps_more = late.remat == "none" or (late.remat == early.remat and set(late.keep) >= set(early.keep))
        assert not (same_mesh and larger and keeps_more)


def test_rows_per_step_are_kept_where_micro_batches_can_make_them_up():
    where = hardware(SMALL, "v5e-8")
    own = settings_of(SMALL, where)
    assert (own.rows, own.batch_size_per_device, own.grad_accum) == (32, 4, 1)
    for settings in _candidates(own, where, Variants(SMALL).kept_choices):
        micro_batch = settings.batch_size_per_device * settings.data * settings.fsdp
        assert settings.rows == max(32, micro_batch)
        assert settings.rows <= 4 * 32
        assert settings.data * settings.fsdp * settings.tensor == 8
    assert {s.tensor for s in _candidates(own, where, Variants(SMALL).kept_choices)} == {1, 2, 4, 8}


def test_several_hosts_allow_no_tensor_axis():
    config = a_config()
    where = hardware(config, "v5e-256")
    assert {s.tensor for s in _candidates(settings_of(config, where), where, Variants(config).kept_choices)} == {1}


def test_each_slice_keeps_a_model_and_is_tried_with_the_rows_asked_for():
    config = a_config(SHALLOW, "mesh.data=-1", "mesh.fsdp=64", "data.seq_len=1024")
    tuning, lines = run(config, "2xv5e-64", "v5p-128", finalists=2)
    assert {row.settings.topology for row in tuning.rows} == {"2xv5e-64", "v5p-128"}
    assert all(tuning.keeps_rows(row) for row in tuning.rows)
    assert all(row.settings.data % 2 == 0 for row in tuning.rows if row.settings.topology == "2xv5e-64")
    assert [line.partition(":")[0] for line in lines] == ["1 of 2", "2 of 2"]


def test_dollars_and_time_rank_slices_differently():
    config = a_config(SHALLOW, lora=LORA)
    cheap, _ = run(config, "v5e-4", "v5p-8", finalists=40)
    fast, _ = run(config, "v5e-4", "v5p-8", finalists=40, by="time")
    assert (cheap.winner.plan.chip, fast.winner.plan.chip) == ("v5e", "v5p")


def test_a_candidate_that_cannot_be_planned_is_a_row_with_its_reason():
    ask = Oracle()

    def moody(config, where):
        if len(ask.asked) == 1:
            ask.asked.append(None)
            raise UserError("the compiler gave up")
        return ask(config, where)

    tuning, _ = run(SMALL, "v5e-8", ask=moody, finalists=3)
    assert [row.reason for row in tuning.rows] == [None, None, "the compiler gave up"]
    assert tuning.winner is tuning.rows[0]
    assert "remat" in text(tuning, "x.yaml")
    assert "the compiler gave up" in text(tuning, "x.yaml")


def test_what_cannot_be_built_is_counted_with_its_reason():
    tuning, _ = run(SMALL, "v5e-8", finalists=1)
    assert "not among the finalists" in tuning.pruned
    odd = a_config("model.preset=gemma-test", "data.seq_len=64")
    tuning, _ = run(odd, "v5e-8", finalists=1)
    assert any("mesh.tensor is 8, which does not divide the model's 4 attention heads" in why for why in tuning.pruned)


def test_nothing_fits():
    tuning, _ = run(a_config("model.preset=gemma-7b"), "v5e-1")
    assert (tuning.rows, tuning.winner) == ([], None)
    report = text(tuning, "x.yaml")
    assert "nothing that was compiled fits" in report
    assert "cannot fit" in report


def test_the_command_starts_what_was_planned(tmp_path):
    tuning, _ = run(SMALL, "v5e-8", finalists=3)
    words = shlex.split(launch_command(tuning, tuning.winner, "x.yaml"))
    assert words[:5] == ["accelerate", "launch", "recipes/pretrain.py", "--config", "x.yaml"]
    path = tmp_path / "x.yaml"
    path.write_text("output_dir: o\ndata: {train: {path: x}, seq_len: 8192}\ntrain: {steps: 1, batch_size: 32}\n")
    config = load_config(path, [word for word in words[5:] if word != "--set"])
    found, wanted = settings_of(config, hardware(config, "v5e-8")), tuning.winner.settings
    same = ("data", "fsdp", "tensor", "batch_size_per_device", "grad_accum", "remat")
    assert [getattr(found, name) for name in same] == [getattr(wanted, name) for name in same]
    finetune = dataclasses.replace(tuning, config=a_config(model={"init_from": "google/gemma-2b"}))
    assert "recipes/finetune.py" in launch_command(finetune, tuning.winner, "x.yaml")


def test_the_report_says_when_a_step_has_other_rows():
    config = a_config(SHALLOW, "data.seq_len=1024")
    tuning, _ = run(config, "v5e-256", finalists=4)
    report = text(tuning, "x.yaml")
    assert not tuning.keeps_rows(tuning.winner)
    assert "rows instead of the config's 256" in report
    assert report.count("accelerate launch") == 2
    assert all(len(line) <= 120 for line in report.splitlines() if "accelerate" not in line)
    assert "bounds: arithmetic only" in text(run(config, "v5e-256", ask=Oracle(compiled=False))[0], "x.yaml")
