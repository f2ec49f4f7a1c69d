"""A run: its config made concrete on the devices, the data and the folder that are there."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_torch_xla_available

from gemma_xla import checkpoint, hf
from gemma_xla.chips import Chip, detect_gpu_chip, get_chip, measure_cpu_peak, topology
from gemma_xla.config import RunConfig
from gemma_xla.config_file import dump_config
from gemma_xla.data.chat import set_chat_template, write_chat_template
from gemma_xla.data.documents import Corpus
from gemma_xla.data.examples import end_tokens
from gemma_xla.data.survey import steps_of_epochs, survey
from gemma_xla.data.tokenizer import check_tokenizer, load_tokenizer, train_tokenizer
from gemma_xla.errors import UserError
from gemma_xla.flops import FlopCounter, num_parameters
from gemma_xla.hf import copy_tokenizer
from gemma_xla.model.config import GemmaConfig, preset
from gemma_xla.model.lora import check_lora
from gemma_xla.storage import reason
from gemma_xla.train import checks, peers
from gemma_xla.train.environment import environment, loggable, versions
from gemma_xla.train.folder import RunFolder
from gemma_xla.train.memory import memory
from gemma_xla.train.remat import with_remat
from gemma_xla.train.resume import check_changes, tokenizer_fingerprint
from gemma_xla.train.watchdog import Watchdog
from gemma_xla.weights import Weights, fingerprint, open_weights, resolve_base
from gemma_xla.xla import open_backend


class Run:
    """Everything a run needs before its first step, checked before anything is written."""

    def __init__(self, config: RunConfig) -> None:
        """
        Raises:
            UserError: the config does not suit the devices, the data or itself.
        """
        self.config = config
        self.folder = RunFolder(config.output_dir)
        self.watchdog = Watchdog(config.watch, self.folder.hang(0), self.say)
        try:
            with self.watchdog.during("preparing the run"):
                self._prepare()
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> None:
        config = self.config
        self.init = self._open_init()
        self.model_config = self._architecture()
        checks.check_seq_len(config, self.model_config)
        if config.lora:
            check_lora(config.lora, self.model_config)
        self.flops = FlopCounter.of_run(self.model_config, config.data.seq_len, config.lora)
        self.backend = open_backend(config.mesh, use_xla=is_torch_xla_available())
        self.watchdog.path = self.folder.hang(self.backend.process_index)
        self.watchdog.compiles = self.backend.compilations_begun
        self.accelerator = self._accelerator()
        checks.check_layers(config, self.model_config, self.backend)
        checks.check_compiler(config, self.backend)
        self.micro_batch_rows = config.train.micro_batch_rows(self.backend.batch_shards)
        checks.check_int8(config, self.micro_batch_rows, self.backend.batch_shards)
        self.chip, self.num_chips = self._chips()
        self.compute_dtype = self._compute_dtype()
        rows = self.micro_batch_rows * config.train.grad_accum
        parameters, trained = num_parameters(self.model_config), self.flops.num_trainable_parameters
        checks.check_memory(config, rows, parameters, trained, self.compute_dtype, self.backend)
        self.memory = memory(self.model_config, self.backend.mesh, config.lora, self.compute_dtype)
        step = {"rows": self.micro_batch_rows, "dtype": self.compute_dtype, "attention": self.attention}
        config = self.config = with_remat(config, self.model_config, self.backend, self.chip, self.memory, **step)
        self._check_folder()
        checks.check_export(config, self.model_config, self.folder)
        self.corpus = Corpus(config.data, seed=config.seed)
        checks.check_eval(config, self.corpus.has_eval)
        if self.is_main:
            self.folder.claim()
        self.folder.fetch_tokenizer()
        self.tokenizer = self._open_tokenizer()
        set_chat_template(self.tokenizer, config.data)
        self.survey = survey(self.corpus, self.tokenizer)
        config = self.config = self._with_steps(rows)
        self.newest = checkpoint.newest(self.folder.checkpoints, self.say, self.backend)
        if self.newest:
            folder, state, _ = self.newest
            check_changes(folder, state, self.state(), config.checkpoint.accept_changes)
        self.weights = self._init_weights()

    @cached_property
    def end_tokens(self) -> list[int]:
        """What ends the model's answers."""
        return end_tokens(self.tokenizer, self.corpus.train_sources, self.config.data)

    @cached_property
    def _base(self) -> str | None:
        """What an adapter's checkpoint knows its base by again."""
        return fingerprint(self.init.reader) if self.config.lora else None

    @property
    def is_main(self) -> bool:
        """Whether this host reports and writes what all share."""
        return self.backend.process_index == 0

    def open_folder(self) -> None:
        """Write what a run's folder starts with, once everything has been checked.

        Raises:
            UserError: the hosts do not see the same folder.
        """
        if self.is_main:
            if not self.folder.tokenizer.exists():
                copy_tokenizer(self._tokenizer_source, self.folder.tokenizer)
            if self.config.data.chat_template:
                write_chat_template(self.tokenizer, self.folder.tokenizer)
            for damaged in (f for f in (self.newest.damaged if self.newest else []) if f.exists()):
                self.say(f"{damaged} is now called {checkpoint.set_aside(damaged).name}")
            self.folder.describe(dump_config(self.config), environment(self.backend))
            self.say("\n".join(filter(None, [self.survey.describe(), f"Memory per device: {self.memory}"])))
            self.folder.publish()
            if self.config.log.trackers:
                self.accelerator.init_trackers("tensorboard", config=loggable(self.config.model_dump()))
        self.backend.barrier()
        if not self.folder.config.exists():
            raise UserError(
                f"output_dir: {self.folder.path} differs from host to host; name a folder that all of them share"
            )

    def close(self) -> None:
        """Let go of the folder."""
        self.watchdog.close()
        self.folder.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        self.close()
        peers.explain(error)

    def state(self) -> dict[str, Any]:
        """What a checkpoint says of the run it belongs to."""
        return {
            "config": self.config.model_dump(),
            "model": dataclasses.asdict(self.model_config),
            "compute_dtype": str(self.compute_dtype).removeprefix("torch."),
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "base": self._base,
            "end_tokens": self.end_tokens,
            "versions": versions(),
        }

    def say(self, text: str) -> None:
        """Print a line, once for all hosts."""
        if not hasattr(self, "backend") or self.is_main:
            print(text, flush=True)

    def _accelerator(self) -> Accelerator:
        try:
            accelerator = Accelerator(log_with=self.config.log.trackers or None, project_dir=str(self.folder.work))
        except ValueError as error:
            raise UserError(f"log.trackers is {self.config.log.trackers}: {error}") from error
        # accelerate leaves those out without a word.
        there = {str(tracker.value) for tracker in accelerator.log_with}
        if absent := [name for name in self.config.log.trackers if name not in there]:
            raise UserError(f"log.trackers names {', '.join(absent)}, not installed here; install it, or leave it out")
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
        # Virtual devices, and processes on the CPU, share one.
        return chip, 1 if kind == "cpu" else self.backend.mesh.num_devices

    def _compute_dtype(self) -> torch.dtype:
        name = self.config.train.compute_dtype
        return self.backend.compute_dtype if name == "auto" else getattr(torch, name)

    def _open_init(self) -> Weights | None:
        """What training starts from, where that is not chance."""
        name, lora = self.config.model.init_from, self.config.lora
        if name is None and lora:
            raise UserError(
                "lora: an adapter needs weights to stand beside, and model.init_from is missing; name a Hugging Face "
                "folder or hub id, or leave lora out"
            )
        if name is None:
            return None
        try:
            return open_weights(resolve_base(name, lora=lora is not None))
        except UserError as error:
            raise UserError(f"model.init_from: {error}") from error

    def _architecture(self) -> GemmaConfig:
        section = self.config.model
        if self.init is None:
            return preset(section.preset or "gemma-2b").replace(**section.overrides)
        return self.init.config.replace(**section.overrides)

    def _init_weights(self) -> hf.TensorReader | None:
        """What is read of them: with adapters always, as a checkpoint holds nothing else."""
        if self.init is None or (self.newest and not self.config.lora):
            return None
        try:
            hf.check_tensors(self.init.reader, self.model_config, self.init.description)
        except UserError as error:
            raise UserError(f"model.init_from: {error}") from error
        return self.init.reader

    @cached_property
    def attention(self) -> str:
        """The implementation that computes it."""
        name = self.config.model.attention
        return self.backend.attention(self.model_config.head_dim, self.config.data.seq_len) if name == "auto" else name

    def _with_steps(self, rows: int) -> RunConfig:
        """The config with its number of steps, where it names that of epochs."""
        train = self.config.train
        if train.steps is not None:
            return self.config
        steps = max(1, steps_of_epochs(self.corpus, self.survey, rows, train.epochs))
        return self.config.model_copy(update={"train": train.model_copy(update={"steps": steps})})

    def _check_folder(self) -> None:
        section = self.config.checkpoint
        try:
            found = checkpoint.complete(self.folder.checkpoints)
        except OSError as error:
            raise UserError(
                f"output_dir: {self.folder.path} cannot be used ({reason(error)}); choose a folder you may write to"
            ) from error
        if found and section.resume == "never":
            raise UserError(
                f"output_dir: {self.folder.path} holds the checkpoint {found[-1].name}; choose another folder, or "
                "checkpoint.resume=auto to continue it"
            )
        if self.is_main:
            trained, whole = self.flops.num_trainable_parameters, num_parameters(self.model_config)
            self.folder.check(checks.disk_space(self.config, trained, whole, len(found)))

    @property
    def _tokenizer_source(self) -> str | Path | None:
        data = self.config.data
        return data.tokenizer or (self.init.tokenizer if self.init and data.vocab_size is None else None)

    def _open_tokenizer(self) -> Any:
        data, source = self.config.data, self._tokenizer_source
        if (self.folder.tokenizer / "tokenizer.json").exists():
            tokenizer = load_tokenizer(self.folder.tokenizer)
        elif source is not None:
            tokenizer = load_tokenizer(source)
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
                train_tokenizer(self.corpus.texts(), data.vocab_size, self.folder.tokenizer)
                self.folder.publish()
            self.backend.barrier()
            self.folder.fetch_tokenizer()
            tokenizer = load_tokenizer(self.folder.tokenizer)
        check_tokenizer(tokenizer, self.model_config)
        return tokenizer
