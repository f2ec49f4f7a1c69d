"""Every config in recipes/configs is one that would run: it loads, its model builds, its rules and mesh fit."""

from pathlib import Path

import pytest
import torch

from gemma_xla.chips import CHIPS, topology
from gemma_xla.config_file import load_config
from gemma_xla.flops import FlopCounter
from gemma_xla.model.config import preset
from gemma_xla.model.gemma import Gemma
from gemma_xla.sharding import PARAMETER_RULES, check_heads, match, resolve_mesh

RECIPES = Path(__file__).parents[1] / "recipes"
CONFIGS = sorted((RECIPES / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_would_run(path):
    config = load_config(path)
    model_config = preset(config.model.preset).replace(**config.model.overrides)
    FlopCounter(model_config, config.data.seq_len)
    with torch.device("meta"):
        model = Gemma(model_config)
    hardware = path.stem.rpartition("pretrain-")[2]
    on_tpu = hardware.partition("-")[0] in CHIPS
    devices = topology(hardware).num_chips if on_tpu else config.mesh.virtual_devices
    mesh = resolve_mesh(config.mesh, devices)
    check_heads(model_config, mesh)
    match(PARAMETER_RULES, {n: tuple(p.shape) for n, p in model.named_parameters()}, mesh, model_config)
    assert config.train.micro_batch_rows(mesh.batch_shards) % mesh.batch_shards == 0
    if on_tpu:
        assert config.hardware.chip == topology(hardware).chip.name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_says_how_to_run_it(path):
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any("accelerate launch recipes/" in line and f"configs/{path.name}" in line for line in header)


def test_recipe_fits_on_a_screen():
    for recipe in RECIPES.glob("*.py"):
        assert len(recipe.read_text().splitlines()) <= 40, recipe
