"""Continuing a run: which changes of its config a checkpoint bears, and putting everything back where it was."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from gemma_xla.backend import Backend
from gemma_xla.checkpoint import CheckpointReader
from gemma_xla.config_file import validate
from gemma_xla.errors import UserError
from gemma_xla.model.gemma import Gemma
from gemma_xla.sharding import Spec
from gemma_xla.train.build import stored, trained
from gemma_xla.train.optimizer import MOMENTS, step_count

# Parts of the config that may differ from that of a checkpoint. They decide where and how a run computes, not what, up
# to the order in which numbers are added; or they are compared in another way: the model by its resolved architecture,
# data by what the saved position says of it, the precision as it was resolved.
_FREE = (
    *("output_dir", "seed", "model.", "mesh.", "eval.", "checkpoint.", "export.", "log.", "watch.", "hardware."),
    *("data.train", "data.eval", "data.tokenizer", "data.vocab_size", "data.shuffle", "data.prefetch"),
    *("train.batch_size", "train.grad_accum", "train.compute_dtype"),
    *("train.remat", "train.keep", "train.layers", "train.loss_chunk", "train.compile"),
)


def check_changes(folder: Path, saved: dict[str, Any], now: dict[str, Any], accepted: list[str]) -> None:
    """Compare what a checkpoint says of its run with the run that is to continue it (see `Run.state`).

    Args:
        folder: the checkpoint, for messages.
        saved: its state.
        now: that of this run.
        accepted: keys whose change is wanted.

    Raises:
        UserError: they differ in what decides the results; every difference is named.
    """
    # Through JSON, as the saved one went: tuples become lists. A setting that did not exist then had its default.
    now = json.loads(json.dumps(now))
    saved = saved | {"config": validate(saved["config"], f"of {folder}").model_dump(mode="json")}
    if different := _differences(saved["model"], now["model"]):
        raise UserError(
            f"checkpoint {folder}: it is of another model: {', '.join(different.values())}; set the config back, or "
            "choose another output_dir"
        )
    if saved["tokenizer"] != now["tokenizer"]:
        raise UserError(
            f"checkpoint {folder}: the run's tokenizer is not the one it was trained with; put back the folder "
            "tokenizer/ of the run, or choose another output_dir"
        )
    different = _differences(_deciding(saved), _deciding(now))
    if refused := {key: text for key, text in different.items() if key not in accepted}:
        raise UserError(
            f"checkpoint {folder}: the config has changed in what decides the results: {', '.join(refused.values())}; "
            f"set it back, choose another output_dir, or set checkpoint.accept_changes=[{', '.join(refused)}]"
        )
    if saved.get("base") != now["base"]:
        raise UserError(
            f"checkpoint {folder}: model.init_from no longer holds the weights that its adapter was trained beside; "
            "bring them back, or choose another output_dir"
        )


def restore_optimizer(
    reader: CheckpointReader,
    model: Gemma,
    specs: dict[str, Spec],
    backend: Backend,
    optimizer: torch.optim.AdamW,
    step: int,
) -> None:
    """Fill an optimizer's state with that of a checkpoint, a tensor at a time."""
    make = stored(reader, backend, "optimizer/")
    for name, parameter in trained(model):
        slots = optimizer.state[parameter]
        slots["step"] = step_count(optimizer, step, backend)
        for moment in MOMENTS:
            slots[moment] = None  # frees the zeros first
            slots[moment] = make(f"{name}/{moment}", parameter.shape, specs[name])


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """What tells two tokenizers apart: a digest of their tokens and ids."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(vocabulary.encode()).hexdigest()


def _deciding(state: dict[str, Any]) -> dict[str, Any]:
    """The keys that decide the results, by their dotted names."""
    flat = flatten(state["config"])
    found = {key: value for key, value in flat.items() if not key.startswith(_FREE)}
    if flat["train.schedule.kind"] == "constant":
        found.pop("train.steps", None)
    return found | {"model.init_from": flat["model.init_from"], "train.compute_dtype": state["compute_dtype"]}


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested dictionaries by their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _differences(saved: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """What to say of each key whose value has changed."""
    return {
        key: f"{key} ({saved.get(key)}, now {now.get(key)})" for key in now | saved if saved.get(key) != now.get(key)
    }
