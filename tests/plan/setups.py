"""Small questions for the planner's tests."""

from __future__ import annotations

from gemma_xla.config import RunConfig
from gemma_xla.config_file import validate
from gemma_xla.plan.setup import Setup, prepare
from gemma_xla.plan.slices import hardware

LORA = {"rank": 16, "target_modules": ["q_proj", "v_proj"]}


def a_config(*changes: str, **sections) -> RunConfig:
    """Gemma 2B with 8192 tokens and a row on each chip, layers scanned, reference attention, unless changed."""
    tree = {
        "output_dir": "runs/x",
        "model": {"preset": "gemma-2b", "attention": "reference"},
        "data": {"train": {"path": "x.txt"}, "seq_len": 8192},
        "mesh": {},
        "train": {"steps": 10, "batch_size_per_device": 1, "remat": "full", "layers": "scan", "loss_chunk": 512},
        "hardware": {},
        **sections,
    }
    for change in changes:
        key, _, value = change.partition("=")
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = _value(value)
    return validate(tree, "test")


def _value(text: str):
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return None if text == "null" else text


def a_setup(*changes: str, topology: str = "v5e-256", **sections) -> Setup:
    config = a_config(*changes, **sections)
    return prepare(config, hardware(config, topology))
