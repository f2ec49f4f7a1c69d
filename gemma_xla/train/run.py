"""A run: its devices, its folder, and what it keeps there.

config.yaml      the resolved config
tokenizer/       the tokenizer, copied or trained
metrics.jsonl    a line per step and per evaluation
tensorboard/     the same for TensorBoard
checkpoints/     what the run continues from
export/          the Hugging Face folder
curves.png       loss and MFU
"""

from __future__ import annotations

import dataclasses
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_torch_xla_available

from gemma_xla import checkpoint
from gemma_xla.checkpoint import replace_text
from gemma_xla.chips import Chip, detect_gpu_chip, get_chip, measure_cpu_peak, topology
from gemma_xla.config import RunConfig
from gemma_xla.config_file import dump_config
from gemma_xla.data.documents import Corpus
from gemma_xla.data.tokenizer import check_tokenizer, load_tokenizer, train_tokenizer
from gemma_xla.errors import UserError
from gemma_xla.flops import FlopCounter
from gemma_xla.hf import copy_tokenizer
from gemma_xla.model.config import GemmaConfig, preset
from gemma_xla.train.build import plan_shards
from gemma_xla.xla import open_backend

_PACKAGES = ("gemma_xla", "torch", "torch_xla", "transformers", "datasets", "accelerate", "safetensors")


class Run:
    """Everything a run needs before its first step, checked before anything is written."""

    def __init__(self, config: RunConfig) -> None:
        """
        Raises:
            UserError: the config does not suit the devices, the data or itself.
        """
        self.config = config
        self.folder = Path(config.output_dir).expanduser()
        self.model_config: GemmaConfig = preset(config.model.preset).replace(**config.model.overrides)
        self._check_seq_len()
        self.flops = FlopCounter(self.model_config, config.data.seq_len)
        self.backend = open_backend(config.mesh, use_xla=is_torch_xla_available())
        plan_shards(self.model_config, self.backend.mesh)
        self.accelerator = self._accelerator()
        self._check_layers()
        self.micro_batch_rows = config.train.micro_batch_rows(self.backend.batch_shards)
        self.chip, self.num_chips = self._chips()
        self.compute_dtype = self._compute_dtype()
        self.checkpoints = self.folder / "checkpoints"
        self._check_folder()
        self.corpus = Corpus(config.data, seed=config.seed)
        self.tokenizer = self._open_tokenizer()

    @property
    def is_main(self) -> bool:
        """Whether this host reports and writes what all share."""
        return self.backend.process_index == 0

    @property
    def tokenizer_folder(self) -> Path:
        return self.folder / "tokenizer"

    def open_folder(self) -> None:
        """Write what a run's folder starts with, once everything has been checked.

        Raises:
            UserError: the hosts do not see the same folder.
        """
        config = self.folder / "config.yaml"
        if self.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_text(config, dump_config(self.config))
            if not self.tokenizer_folder.exists():
                copy_tokenizer(self.config.data.tokenizer, self.tokenizer_folder)
            if self.config.log.trackers:
                self.accelerator.init_trackers("tensorboard", config=_flat(self.config.model_dump()))
        self.backend.barrier()
        if not config.exists():
            raise UserError(
                f"output_dir: {self.folder} differs from host to host; name a folder that all of them share"
            )

    def state(self) -> dict[str, Any]:
        """What a checkpoint says of the run it belongs to."""
        return {
            "config": self.config.model_dump(),
            "model": dataclasses.asdict(self.model_config),
            "versions": _versions(),
        }

    def say(self, text: str) -> None:
        """Print a line, once for all hosts."""
        if self.is_main:
            print(text, flush=True)

    def _check_seq_len(self) -> None:
        length, limit = self.config.data.seq_len, self.model_config.max_position_embeddings
        if length > limit:
            raise UserError(
                f"data.seq_len is {length} but the model's max_position_embeddings is {limit}; shorten the rows, or "
                "raise model.overrides.max_position_embeddings"
            )

    def _check_layers(self) -> None:
        if self.config.train.layers == "scan" and self.backend.name != "xla":
            raise UserError("train.layers is 'scan', which needs PyTorch/XLA; set it to 'loop' to run without")
        windows = {self.model_config.window(i) for i in range(self.model_config.num_hidden_layers)}
        if self.config.train.layers == "scan" and len(windows) > 1:
            raise UserError(
                "train.layers is 'scan', which needs equal layers, but layer_types differ; set it to 'loop'"
            )

    def _accelerator(self) -> Accelerator:
        try:
            accelerator = Accelerator(log_with=self.config.log.trackers or None, project_dir=str(self.folder))
        except ValueError as error:
            raise UserError(f"log.trackers is {self.config.log.trackers}: {error}") from error
        if self.backend.name == "torch":
            self.backend.device = accelerator.device
            if accelerator.num_processes > 1:
                raise UserError(
                    f"accelerate started {accelerator.num_processes} processes; several processes need PyTorch/XLA: "
                    "start it with --num_processes 1"
                )
        return accelerator

    def _chips(self) -> tuple[Chip, int]:
        section, kind = self.config.hardware, self.backend.device_kind
        if section.chip != "auto":
            chip = get_chip(section.chip)
        elif kind == "cpu":
            chip = measure_cpu_peak()
        elif self.backend.name == "xla":
            chip = topology(kind).chip
        else:
            chip = detect_gpu_chip(kind)
        if section.price is not None:
            chip = chip.with_price(section.price)
        # Virtual devices share one CPU.
        return chip, 1 if kind == "cpu" else self.backend.mesh.num_devices

    def _compute_dtype(self) -> torch.dtype:
        name = self.config.train.compute_dtype
        return self.backend.compute_dtype if name == "auto" else getattr(torch, name)

    def _check_folder(self) -> None:
        found = checkpoint.complete(self.checkpoints)
        if found and self.config.checkpoint.resume == "never":
            raise UserError(
                f"output_dir: {self.folder} holds the checkpoint {found[-1].name}; choose another folder, or "
                "checkpoint.resume=auto to continue it"
            )

    def _open_tokenizer(self) -> Any:
        data = self.config.data
        if (self.tokenizer_folder / "tokenizer.json").exists():
            tokenizer = load_tokenizer(self.tokenizer_folder)
        elif data.tokenizer is not None:
            tokenizer = load_tokenizer(data.tokenizer)
        elif data.vocab_size is None:
            raise UserError(
                "data.tokenizer is missing; name a tokenizer, or set data.vocab_size to have one trained on data.train"
            )
        elif data.vocab_size > self.model_config.vocab_size:
            raise UserError(
                f"data.vocab_size is {data.vocab_size} but the model's vocab_size is {self.model_config.vocab_size}; "
                "lower it, or raise model.overrides.vocab_size"
            )
        else:
            self.say(f"Training a tokenizer with {data.vocab_size} tokens ...")
            if self.is_main:
                train_tokenizer(self.corpus.texts(), data.vocab_size, self.tokenizer_folder)
            self.backend.barrier()
            tokenizer = load_tokenizer(self.tokenizer_folder)
        check_tokenizer(tokenizer, self.model_config)
        return tokenizer


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names to values that TensorBoard can store."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, (int, float, str, bool)) else json.dumps(value)
    return flat
