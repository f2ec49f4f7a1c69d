"""What is checked of a config once the model and the devices are known, before anything is written or paid for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

import torch

from gemma_xla.backend import Backend
from gemma_xla.checkpoint import complete
from gemma_xla.config import RunConfig
from gemma_xla.errors import UserError
from gemma_xla.hf import check_push
from gemma_xla.hf.config import config_json
from gemma_xla.hf.folder import ADAPTER, check_free
from gemma_xla.hf.writer import parse_size
from gemma_xla.model.config import GemmaConfig
from gemma_xla.model.linear import MOST_SUMMED
from gemma_xla.train.folder import RunFolder

# Three arrays of int32 and one of int64 for each position (`gemma_xla.data.packing.pack`).
_BATCH_BYTES = 20
# Parameter, gradient and two moments, float32.
_TRAINING_BYTES = 16
# The same without the gradient.
_CHECKPOINT_BYTES = 12


def check_seq_len(config: RunConfig, model: GemmaConfig) -> None:
    """
    Raises:
        UserError: rows are longer than the model allows.
    """
    length, limit = config.data.seq_len, model.max_position_embeddings
    if length > limit:
        raise UserError(
            f"data.seq_len is {length} but the model's max_position_embeddings is {limit}; shorten the rows, or "
            "raise model.overrides.max_position_embeddings"
        )


def check_layers(config: RunConfig, model: GemmaConfig, backend: Backend) -> None:
    """
    Raises:
        UserError: the layers cannot be scanned.
    """
    if config.train.layers == "scan" and backend.name != "xla":
        raise UserError("train.layers is 'scan', which needs PyTorch/XLA; set it to 'loop' to run without")
    check_scan(config, model)


def check_compiler(config: RunConfig, backend: Backend) -> None:
    """
    Raises:
        UserError: torch.compile is asked for where it cannot work.
    """
    wanted, on_gpu = config.train.compile, backend.device.type == "cuda"
    if backend.name == "xla":
        for key, asked in ("train.compile", wanted is True), ("model.attention", config.model.attention == "flex"):
            if asked:
                value = "true" if key == "train.compile" else "'flex'"
                raise UserError(f"{key} is {value}, but PyTorch/XLA compiles by itself; leave it at 'auto'")
    elif wanted is True or (wanted == "auto" and on_gpu):
        variable, names = ("CC", ("gcc", "clang")) if on_gpu else ("CXX", ("g++", "clang++"))
        if not (os.environ.get(variable) or any(map(shutil.which, names))):
            raise UserError(
                f"train.compile is {str(wanted).lower()}, and there is no compiler that torch.compile could call "
                f"({' or '.join(names)}); install one, name it in {variable}, or set train.compile=false"
            )


def check_scan(config: RunConfig, model: GemmaConfig) -> None:
    """
    Raises:
        UserError: the layers are to be scanned, but differ.
    """
    if config.train.layers == "scan" and len({model.window(i) for i in range(model.num_hidden_layers)}) > 1:
        raise UserError("train.layers is 'scan', which needs equal layers, but layer_types differ; set it to 'loop'")


def check_int8(config: RunConfig, micro_batch_rows: int, batch_shards: int) -> None:
    """
    Raises:
        UserError: more products of 8-bit integers are summed than 32 bits hold.
    """
    positions = micro_batch_rows // batch_shards * config.data.seq_len
    if config.train.precision == "int8" and "grad_weight" in config.train.int8_products and positions > MOST_SUMMED:
        raise UserError(
            f"train.precision is 'int8', and a device has {positions} positions of a micro-batch; sums of more than "
            f"{MOST_SUMMED} overflow: raise train.grad_accum, or leave grad_weight out of train.int8_products"
        )


def check_memory(
    config: RunConfig, rows: int, parameters: int, trained: int, frozen_dtype: torch.dtype, backend: Backend
) -> None:
    """Compare what cannot be done without with the memory of this machine.

    Args:
        rows: of a step's batch.
        parameters: of the model.
        trained: how many are.
        frozen_dtype: what the others are kept in.

    Raises:
        UserError: batches, or a model that is trained on the CPU, do not fit.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    ahead, length = config.data.prefetch, config.data.seq_len
    # `ahead` are ready, one is in the making, one in use.
    batches = rows // backend.process_count * length * _BATCH_BYTES * (ahead + 2)
    if batches > total:
        raise UserError(
            f"train.batch_size: {rows:,} rows of {length:,} tokens, {ahead} batches ahead (data.prefetch), take "
            f"{_gigabytes(batches)} of memory and this machine has {_gigabytes(total)}; lower one of them"
        )
    model = trained * _TRAINING_BYTES + (parameters * frozen_dtype.itemsize if config.lora else 0)
    if backend.device_kind == "cpu" and model > total:
        raise UserError(
            f"model: training {trained:,} parameters on the CPU takes at least {_gigabytes(model)} of memory and "
            f"this machine has {_gigabytes(total)}; choose a smaller model"
        )


def check_export(config: RunConfig, model: GemmaConfig, folder: RunFolder) -> None:
    """
    Raises:
        UserError: the export at the end of the run, or its upload, would fail.
    """
    section = config.export
    if not section.at_end:
        if section.push_to_hub:
            raise UserError(
                f"export.push_to_hub is {section.push_to_hub!r}, but export.at_end is false and there will be nothing "
                "to upload; set export.at_end=true"
            )
        return
    try:
        if config.lora:
            check_free(folder.adapter, overwrite=True, kind=ADAPTER)
        if section.merged or not config.lora:
            parse_size(section.max_shard_size)
            config_json(model, section.dtype)
            check_free(folder.export, overwrite=True)
    except UserError as error:
        raise UserError(f"export: {error}; or set export.at_end=false") from error
    if section.push_to_hub:
        try:
            check_push(section.push_to_hub)
        except UserError as error:
            raise UserError(f"export.push_to_hub: {error}") from error


def check_eval(config: RunConfig, has_eval: bool) -> None:
    """
    Raises:
        UserError: something depends on an evaluation that will not take place.
    """
    section = config.eval
    needing = {
        "eval.early_stopping_patience": section.early_stopping_patience,
        "checkpoint.keep_best": config.checkpoint.keep_best,
        "eval.prompts": section.prompts,
        "export.verify": config.export.verify and config.lora,
    }
    for name in (name for name, wanted in needing.items() if wanted):
        if not has_eval:
            raise UserError(f"{name} needs held-out examples; name some in data.eval, or set data.eval_fraction")
        if name not in ("eval.prompts", "export.verify") and not section.every:
            raise UserError(f"{name} needs evaluations while training goes on, and eval.every is 0; set eval.every")


def disk_space(config: RunConfig, trained: int, parameters: int, existing: int) -> int:
    """Bytes that a run is still going to add to its folder.

    Args:
        trained: parameters that are.
        parameters: of the whole model.
        existing: checkpoints that are already there.
    """
    # Where only epochs are known yet, at least one.
    steps, section, export = config.train.steps or 1, config.checkpoint, config.export
    saved = steps // section.every + 1 if section.every else 1
    for_good = steps // section.keep_every if section.keep_every else 0
    # One more than is kept: the oldest goes when the newest is whole.
    kept = min(saved, section.keep_last + 1 + for_good + section.keep_best)
    exported = 0
    if export.at_end:
        exported += trained * torch.float32.itemsize if config.lora else 0
        exported += parameters * getattr(torch, export.dtype).itemsize if export.merged or not config.lora else 0
    return max(0, kept - existing) * trained * _CHECKPOINT_BYTES + exported


class DiskWatch:
    """Warns when what a run is still going to write no longer fits its disk, before a save fails of it."""

    def __init__(self, config: RunConfig, trained: int, parameters: int, folder: RunFolder) -> None:
        """
        Args:
            trained: parameters that are.
            parameters: of the whole model.
            folder: the run's.
        """
        self._config, self._trained, self._parameters, self._folder = config, trained, parameters, folder
        self._short = False

    def look(self, say: Callable[[str], None]) -> None:
        """Say so if there is no longer room for the rest, once until there is again."""
        existing = len(complete(self._folder.checkpoints)) if self._folder.local else 0
        needed = disk_space(self._config, self._trained, self._parameters, existing)
        shortage = self._folder.shortage(needed)
        if shortage and not self._short:
            say(shortage)
        self._short = shortage is not None


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB"
