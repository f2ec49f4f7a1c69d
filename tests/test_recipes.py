"""Every config in recipes/configs is one that would run: it loads, its model builds, its rules and mesh fit."""

import re
from pathlib import Path

import pytest
import torch

from gemma_xla.chips import CHIPS, topology
from gemma_xla.config import RunConfig
from gemma_xla.config_file import load_config
from gemma_xla.flops import FlopCounter
from gemma_xla.model.config import GemmaConfig, preset
from gemma_xla.model.lora import check_lora
from gemma_xla.sharding import resolve_mesh
from gemma_xla.train.memory import memory

RECIPES = Path(__file__).parents[1] / "recipes"
CONFIGS = sorted((RECIPES / "configs").glob("*.yaml"))


def architecture(config: RunConfig) -> GemmaConfig:
    """That of the preset, or of the model of the hub that bears its name; the quickstart's is the tiny one."""
    start = config.model.init_from
    name = config.model.preset or {"runs/quickstart": "gemma-tiny"}.get(start) or start.removeprefix("google/")
    return preset(name).replace(**config.model.overrides)


def hardware(path: Path) -> str:
    return re.split("(?:pretrain|lora|full)-", path.stem)[-1]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_would_run(path):
    config = load_config(path)
    model_config = architecture(config)
    FlopCounter(model_config, config.data.seq_len)
    on_tpu = hardware(path).partition("-")[0] in CHIPS
    devices = topology(hardware(path)).num_chips if on_tpu else config.mesh.virtual_devices or 1
    mesh = resolve_mesh(config.mesh, devices)
    if config.lora:
        check_lora(config.lora, model_config)
    # On the meta device: rules cover every parameter, and the mesh divides them.
    held = memory(model_config, mesh, config.lora, torch.float32 if config.mesh.virtual_devices else torch.bfloat16)
    assert config.train.micro_batch_rows(mesh.batch_shards) % mesh.batch_shards == 0
    if on_tpu:
        assert config.hardware.topology == hardware(path)
    if config.model.init_from:
        said = re.search(r"^# Weights, gradients and Adam: ([\d.]+ [GM]B)", path.read_text(), re.MULTILINE)[1]
        number, unit = said.split()
        assert float(number) == pytest.approx(held.total / {"GB": 1e9, "MB": 1e6}[unit], rel=3e-3)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_says_how_to_run_it(path):
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any("accelerate launch recipes/" in line and f"configs/{path.name}" in line for line in header)


def test_recipe_fits_on_a_screen():
    for recipe in (RECIPES / "pretrain.py", RECIPES / "finetune.py"):
        assert len(recipe.read_text().splitlines()) <= 40, recipe
