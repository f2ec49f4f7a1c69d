"""The folder of a run, local or in a bucket: claimed by one run at a time, checked before anything is spent."""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gemma_xla import checkpoint
from gemma_xla.errors import TrainingError, UserError
from gemma_xla.storage import (
    copy_tree,
    is_local,
    location,
    read_text,
    reason,
    remove_file,
    remove_tree,
    replace_text,
)

_CLAIM = ".claim"


class RunFolder:
    """What a run keeps, and where.

    config.yaml        the resolved config
    environment.json   versions and machines
    README.md          what is what
    tokenizer/         the tokenizer, copied or trained
    metrics.jsonl      a line per step and per evaluation
    tensorboard/       the same for TensorBoard
    samples.jsonl      what became of eval.prompts at each evaluation
    checkpoints/       what the run continues from
    export/            the Hugging Face folder
    adapter/           with LoRA: the adapter, as peft keeps it
    curves.png         loss and MFU
    hang-0.txt         where each thread was when host 0 hung

    Of a folder in a bucket, ``work`` is a local stand-in for what other libraries write; `publish` copies it.
    """

    def __init__(self, output_dir: str) -> None:
        """
        Raises:
            UserError: the URL is of a kind that nothing installed can open.
        """
        self.path = location(output_dir)
        self.local = is_local(self.path)
        self._open = ExitStack()
        self.work = self.path if self.local else Path(self._open.enter_context(tempfile.TemporaryDirectory()))
        self._claim = f"{socket.gethostname()} {os.getpid()} {uuid.uuid4()}"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tokenizer(self) -> Path:
        """A local folder, absent at first."""
        return self.work / "tokenizer"

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    def hang(self, host: int) -> Path:
        return self.path / f"hang-{host}.txt"

    def check(self, needed: int) -> None:
        """Make sure that the folder can be written to and has room; nothing stays behind.

        Args:
            needed: bytes that the run is going to add to it.

        Raises:
            UserError: it cannot, or has not.
        """
        existing = self.path
        while self.local and not existing.exists():
            existing = existing.parent
        if not self.local:
            self._try_bucket()
            return
        try:
            with tempfile.TemporaryFile(dir=existing):
                pass
            shortage = _shortage(existing, needed)
        except OSError as error:
            raise UserError(
                f"output_dir: nothing can be written to {existing} ({reason(error)}); choose a folder you may write to"
            ) from error
        if shortage:
            raise UserError(
                f"output_dir: {self.path} {shortage} of this run need {needed / 1e9:,.1f} GB; make room, choose "
                "another disk or lower checkpoint.keep_last"
            )

    def shortage(self, needed: int) -> str | None:
        """What to say where the disk has no room for so many bytes."""
        try:
            shortage = _shortage(self.path, needed) if self.local else None
        except OSError:
            return None  # the save that follows tells
        if shortage is None:
            return None
        return (
            f"warning: {self.path} {shortage} still to come need {needed / 1e9:,.1f} GB; make room, or a save will fail"
        )

    def claim(self) -> None:
        """Make this run the only one that writes to the folder, until `close`.

        In a bucket the newest claim counts: an older run that is still alive finds out when it next saves.

        Raises:
            UserError: another run of this machine, or of one that shares the disk, is writing to it.
        """
        if not self.local:
            with self._written():
                replace_text(self.path / _CLAIM, self._claim)
            return
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / _CLAIM, timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise UserError(
                f"output_dir: another run is writing to {self.path}; wait for its end, stop it, or choose another "
                "folder"
            ) from error
        self._open.callback(self._release, lock, made)
        for left in self.path.glob(".tokenizer-*"):
            remove_tree(left)

    def check_claim(self) -> None:
        """
        Raises:
            TrainingError: another run has claimed the folder since.
        """
        if self.local:
            return
        try:
            claim = read_text(self.path / _CLAIM)
        except Exception:  # noqa: BLE001 (the save that follows tells)
            return
        if claim != self._claim:
            raise TrainingError(f"output_dir: another run has begun to write to {self.path}; this one ends")

    def describe(self, config: str, environment: dict[str, Any]) -> None:
        """Write what says how the run was made, once everything has been checked."""
        with self._written():
            replace_text(self.config, config)
            replace_text(self.path / "environment.json", json.dumps(environment, indent=1) + "\n")
            replace_text(self.path / "README.md", _README.format(name=self.path.name, path=self.path))
            checkpoint.tidy(self.checkpoints)

    def publish(self) -> None:
        """Copy what is only here to where the run lives.

        Raises:
            UserError: it cannot be written there.
        """
        if not self.local:
            with self._written():
                copy_tree(self.work, self.path)

    def publish_tensorboard(self) -> None:
        """Copy what TensorBoard reads, so that it can be watched during the run."""
        if not self.local and (self.work / "tensorboard").exists():
            copy_tree(self.work / "tensorboard", self.path / "tensorboard")

    def fetch_tokenizer(self) -> None:
        """Bring the tokenizer of an earlier start, or of another host, here."""
        if not self.local and (self.path / "tokenizer" / "tokenizer.json").exists():
            copy_tree(self.path / "tokenizer", self.tokenizer)

    def close(self) -> None:
        """Let go of the folder; a folder that was made and is still empty goes."""
        self._open.close()

    def _try_bucket(self) -> None:
        probe = self.path / f".probe-{uuid.uuid4()}"
        try:
            replace_text(probe, "")
            remove_file(probe)
        except Exception as error:  # noqa: BLE001 (each file system has its own)
            raise UserError(
                f"output_dir: nothing can be written to {self.path} ({reason(error)}); check the name of the bucket "
                "and your credentials"
            ) from error

    @contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 (each file system has its own)
            raise UserError(
                f"output_dir: {self.path} could not be written to ({reason(error)}); what was saved is whole: mend "
                "that and start again to continue"
            ) from error

    def _release(self, lock: FileLock, made: list[Path]) -> None:
        # Before it is let go: another run may wait for it, and would lock a file that is no longer there.
        (self.path / _CLAIM).unlink(missing_ok=True)
        lock.release()
        for folder in made:
            try:
                folder.rmdir()
            except OSError:
                break


def _shortage(folder: Path, needed: int) -> str | None:
    """The beginning of a sentence, where the disk of a folder has no room for so many bytes.

    Raises:
        OSError: it cannot be asked.
    """
    free = shutil.disk_usage(folder).free
    return f"has room for {free / 1e9:,.1f} GB, but the checkpoints and the export" if free < needed else None


_README = """\
# {name}
A Gemma trained with gemma_xla. Start the same recipe with `config.yaml` to continue it.

| | |
|---|---|
| `config.yaml` | everything that decides what the run computes, resolved |
| `environment.json` | versions, devices and command of the latest start |
| `metrics.jsonl` | a line of figures per step and per evaluation |
| `tensorboard/` | the same for `tensorboard --logdir {path}` |
| `curves.png` | loss and MFU over steps, drawn at the end |
| `hang-N.txt` | where each thread of process N was when it hung, if it did |
| `samples.jsonl` | the continuations of `eval.prompts` at each evaluation, if there are prompts |
| `tokenizer/` | the tokenizer, as every Hugging Face program reads it |
| `checkpoints/` | `step-N/`: what the run continues from, on any mesh; safetensors and JSON |
| `export/` | the Hugging Face folder made at the end; `gemma-xla export {path} OUT` makes another |
| `adapter/` | with LoRA, the adapter in peft's format; `gemma-xla export {path} OUT --merge` makes a model of it |
"""
