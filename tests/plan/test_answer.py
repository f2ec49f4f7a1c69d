"""Answers that are kept: found again, never half-written, never those to another question."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from gemma_xla.config_file import load_config
from gemma_xla.errors import UserError
from gemma_xla.plan import cache as cache_module
from gemma_xla.plan import work
from gemma_xla.plan.answer import Planner
from gemma_xla.plan.cache import Cache, key
from gemma_xla.plan.children import PlanError
from gemma_xla.plan.setup import prepare
from gemma_xla.plan.slices import hardware
from tests.plan.test_report import make_plan

CONFIG = Path("recipes/configs/gemma-2b-pretrain-v5e-256.yaml")


def setup(*overrides: str, topology: str | None = None):
    config = load_config(CONFIG, list(overrides))
    return prepare(config, hardware(config, topology))


@pytest.fixture
def asked(monkeypatch):
    """The setups that had to be worked out."""
    found = []

    def work_out(setup, progress, timeout):
        found.append(setup)
        return make_plan(), ["HloModule one", "HloModule two"]

    monkeypatch.setattr(work, "work_out", work_out)
    return found


def test_the_same_question_is_worked_out_once(asked, tmp_path):
    planner = Planner(Cache(tmp_path))
    first = planner.plan(setup(), "a.yaml", 1e12)
    again = Planner(Cache(tmp_path)).plan(setup("train.steps=7"), "b.yaml", 2e12)
    assert len(asked) == 1
    assert again.estimate == first.estimate
    # What does not come from the compiler is today's.
    assert (again.config, again.figures.tokens, again.figures.days) == ("b.yaml", 2e12, 2 * first.figures.days)
    assert planner.cache.programs(setup()) == ["HloModule one", "HloModule two"]


@pytest.mark.parametrize(
    "other",
    [
        {"topology": "v5p-128"},
        {"topology": "2xv5e-128", "overrides": ["mesh.data=2"]},
        {"overrides": ["mesh.data=2"]},
        {"overrides": ["data.seq_len=4096"]},
        {"overrides": ["train.remat=none"]},
        {"overrides": ["train.optimizer.clip_norm=0"]},
        {"overrides": ["train.batch_size_per_device=2"]},
        {"overrides": ["model.attention=sdpa"]},
        {"overrides": ["model.overrides.num_hidden_layers=2"]},
        {"overrides": ["model.preset=gemma-7b"]},
        {"overrides": ["lora={rank: 8}"]},
    ],
    ids=str,
)
def test_another_question_has_another_key(other):
    assert key(setup(*other.get("overrides", []), topology=other.get("topology"))) != key(setup())


def test_prices_and_schedules_are_no_part_of_the_question():
    assert key(setup("hardware.price=3", "train.steps=5", "train.schedule.warmup_steps=0")) == key(setup())


def test_other_code_asks_anew(monkeypatch):
    before = key(setup())
    monkeypatch.setattr(cache_module, "_code", lambda: "changed")
    assert key(setup()) != before
    monkeypatch.undo()
    monkeypatch.setattr(cache_module, "versions", lambda: {"libtpu": "1"})
    assert key(setup()) != before


def test_the_user_s_own_compiler_settings_are_planned_with_and_named(monkeypatch):
    before = key(setup())
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_some=1")
    assert key(setup()) != before
    assert "LIBTPU_INIT_ARGS" in setup().notes[-1]
    assert setup().notes[-1].endswith(": --xla_some=1")


def test_two_at_once_do_not_disturb_each_other(asked, tmp_path):
    planners = [Planner(Cache(tmp_path)) for _ in range(4)]
    threads = [threading.Thread(target=planner.plan, args=(setup(), "a", None)) for planner in planners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.name for path in tmp_path.iterdir()] == [key(setup())]


def test_what_was_not_finished_leaves_nothing(asked, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module.json, "dumps", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Cache(tmp_path).save(setup(), make_plan(), [])
    assert list(tmp_path.iterdir()) == []


def test_a_crash_is_not_kept(tmp_path, monkeypatch):
    def work_out(*_):
        raise PlanError("to compile failed")

    monkeypatch.setattr(work, "work_out", work_out)
    with pytest.raises(PlanError):
        Planner(Cache(tmp_path)).plan(setup(), "a", None)
    assert list(tmp_path.iterdir()) == []


def test_damage_is_named_with_the_way_out(asked, tmp_path):
    planner = Planner(Cache(tmp_path))
    planner.plan(setup(), "a", None)
    (entry := tmp_path / key(setup()) / "plan.json").write_text("{")
    with pytest.raises(UserError, match="plan.json.*delete it"):
        planner.plan(setup(), "a", None)
    entry.write_text("{}")
    with pytest.raises(UserError, match="plan.json.*delete it"):
        planner.plan(setup(), "a", None)


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--cache: .*file/plan cannot be written to .*name another folder"):
        Cache(tmp_path / "file" / "plan")


def test_a_known_plan_needs_no_pytorch(asked, tmp_path):
    Planner(Cache(tmp_path)).plan(setup(), "a", None)
    code = (
        "import sys; from gemma_xla.cli import main\n"
        f"main(['plan', {str(CONFIG)!r}, '--cache', {str(tmp_path)!r}, '--json'])\n"
        "assert not {'torch', 'jax', 'transformers'} & sys.modules.keys(), 'slow'"
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}  # noqa: PTH109
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["topology"] == make_plan().topology


def test_a_glance_asks_the_compiler_nothing(asked, tmp_path):
    planner = Planner(Cache(tmp_path))
    bound = planner.glance(setup(), "a.yaml", 1e12)
    assert asked == []
    assert not bound.compiled and bound.estimate is None
    assert (bound.config, bound.figures.tokens) == ("a.yaml", 1e12)
    # A bound is no answer to keep.
    assert planner.cache.load(setup()) is None
    known = planner.plan(setup(), "a.yaml", 1e12)
    assert planner.glance(setup(), "a.yaml", 1e12) == known
