"""Without the compiler there is still an answer, and nobody takes it for an estimate."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from gemma_xla.config_file import load_config
from gemma_xla.errors import UserError
from gemma_xla.plan import work
from gemma_xla.plan.children import Progress
from gemma_xla.plan.report import BOUNDS, text
from gemma_xla.plan.setup import prepare
from gemma_xla.plan.slices import hardware

CONFIGS = Path("recipes/configs")


def work_out(name: str, *overrides: str):
    config = load_config(CONFIGS / f"{name}.yaml", list(overrides))
    return work.work_out(prepare(config, hardware(config)), Progress(io.StringIO()), 60.0)


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(work, "find_spec", lambda name: None if name == "libtpu" else object())


@pytest.mark.parametrize("name", ["gemma-2b-pretrain-v5e-256", "gemma-7b-lora-v5e-8"])
def test_arithmetic_alone(no_compiler, name):
    plan, programs = work_out(name)
    assert (plan.compiled, plan.estimate, programs) == (False, None, [])
    assert plan.memory.used > plan.memory.parameters + plan.memory.optimizer > 0
    # Everything at its peak: no real step is as fast.
    assert 0.5 < plan.figures.mfu < 1
    assert BOUNDS in text(plan)
    assert "pip install jax==" in "".join(plan.notes)
    assert "libtpu==" in "".join(plan.notes)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["mesh.fsdp=32", "mesh.tensor=8"], "mesh.tensor is 8; v5e-256 has 64 hosts, and with several it must be 1"),
        (["model.overrides.hidden_size=2052"], "mesh: .* does not divide it; choose a smaller mesh axis"),
        (["data.seq_len=16384"], "max_position_embeddings"),
        (["model.overrides.sliding_window=512", "model.overrides.layer_types=[sliding_attention]"], "layer_types"),
    ],
)
def test_what_the_run_would_refuse(overrides, message):
    with pytest.raises(UserError, match=message) as error:
        work_out("gemma-2b-pretrain-v5e-256", *overrides)
    assert "\n" not in str(error.value)
