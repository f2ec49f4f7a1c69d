"""Writing checkpoints while training goes on."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Event, Thread, get_native_id
from typing import Any, BinaryIO

import torch
import xxhash

from gemma_xla.backend import Backend, Piece
from gemma_xla.checkpoint.folder import FORMAT, STATE, discard, folder_name, prune, seal
from gemma_xla.checkpoint.reader import INDEX, Part, Stored
from gemma_xla.errors import TrainingError
from gemma_xla.storage import make_folder, read_text, reason, remove_file, remove_tree, replace_text, retried, sync
from gemma_xla.tensor_file import Entry, write_tensors

# How long the first host waits for the files of the others, in seconds.
_PATIENCE = 1800
# A whole tensor's shape and type, and this host's parts of it.
Held = dict[str, tuple[torch.Size, torch.dtype, list[Piece]]]


class LostPart(FileNotFoundError):
    """Another host's part of a checkpoint does not come."""


class Saver:
    """Saves checkpoints in the background: `save` returns as soon as the values are copied to the host.

    A save that fails is told to ``say`` and leaves the older checkpoints whole; `wait` tells whether the latest one
    succeeded.
    """

    def __init__(
        self, root: Path, backend: Backend, *, keep_last: int, keep_every: int = 0, say: Callable[[str], None] = print
    ) -> None:
        """
        Args:
            root: the run's folder of checkpoints.
            backend: where the tensors are.
            keep_last: how many of the newest are kept.
            keep_every: those whose step is a multiple of it are kept too; 0: none.
            say: told of what goes wrong.
        """
        self.root = root
        self.backend = backend
        self.keep_last, self.keep_every = keep_last, keep_every
        self.say = say
        self._alone = Event()
        self._thread: Thread | None = None
        self._error: Exception | None = None
        self._step = 0

    def save(self, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any], keep: int | None = None) -> None:
        """Save ``tensors`` and ``state`` (JSON) as the checkpoint of ``step``. Every host must call it.

        The checkpoint of step ``keep`` is kept too, however old it is.

        Waits for the save before, if that is not done yet: one copy of the tensors is in memory at a time.
        """
        self.wait()
        folder = self.root / folder_name(step)
        self._error, self._step = None, step
        if self.backend.process_index == 0:
            self._attempt(folder, lambda: discard(folder))
        # No host writes before the remains of an earlier attempt are gone.
        self.backend.barrier()
        if self._error:
            return
        held = {name: (tensor.shape, tensor.dtype, self.backend.pieces(tensor)) for name, tensor in tensors.items()}
        sealed = {"format": FORMAT, "step": step, "hosts": self.backend.process_count, **state}
        self._thread = Thread(target=self._work, args=(folder, held, sealed, keep), name="checkpoint")
        self._thread.start()

    def wait(self) -> Exception | None:
        """Wait until the latest save is over; return what went wrong with it, if anything did."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self._error

    def expect_nobody(self) -> None:
        """The other hosts are gone: a save that waits for their part fails."""
        self._alone.set()

    def close(self) -> None:
        """Wait for the latest save.

        Raises:
            TrainingError: it failed.
        """
        if error := self.wait():
            raise TrainingError(
                f"{self.root}: the checkpoint of step {self._step}, the latest, could not be written "
                f"({reason(error)}); make room or repair the disk and start again, to continue from the one before it"
            ) from error

    def _work(self, folder: Path, held: Held, state: dict[str, Any], keep: int | None) -> None:
        index = self.backend.process_index
        if sys.platform == "linux":
            # This thread alone: on a CPU, a step whose threads wait for one another would wait for this one too.
            os.setpriority(os.PRIO_PROCESS, get_native_id(), 19)

        def write() -> None:
            write_parts(folder / f"tensors-{index:05d}", held, self.say)
            held.clear()
            if index == 0:
                summaries = [folder / f"tensors-{host:05d}.sums" for host in range(state["hosts"])]
                files = retried(lambda: self._gather(summaries), f"checkpoint {folder}", self.say)
                for summary in summaries:
                    remove_file(summary)
                replace_text(folder / STATE, seal(state | {"files": files}))
                sync(self.root)

        self._attempt(folder, write)
        if index == 0 and not self._error:
            try:
                prune(self.root, self.keep_last, self.keep_every, keep)
            except Exception as error:  # noqa: BLE001 (the next save tries again)
                self.say(f"warning: older checkpoints could not be removed ({reason(error)}); training goes on")

    def _attempt(self, folder: Path, action: Callable[[], None]) -> None:
        """Do a part of a save; training goes on, whatever the disk says."""
        try:
            action()
        except Exception as error:  # noqa: BLE001 (each file system has its own)
            self._error = error
            self._give_up(folder, error)

    def _gather(self, summaries: list[Path]) -> dict[str, Any]:
        """Wait until all hosts have written their part; return what is in the folder then."""
        deadline = time.monotonic() + _PATIENCE
        files: dict[str, Any] = {}
        for host, summary in enumerate(summaries):
            while not summary.exists():
                absent = self._alone.is_set() or time.monotonic() > deadline
                if absent or summary.with_suffix(".failed").exists():
                    raise LostPart(f"host {host} did not write its part")
                time.sleep(0.2)
            files |= json.loads(read_text(summary))
        return files

    def _give_up(self, folder: Path, error: Exception) -> None:
        self.say(
            f"warning: the checkpoint of step {self._step} could not be written ({reason(error)}); training goes on, "
            "and the older checkpoints are whole"
        )
        try:
            if self.backend.process_index == 0:
                remove_tree(folder)
            else:
                make_folder(folder)
                replace_text(folder / f"tensors-{self.backend.process_index:05d}.failed", "")
        except Exception as second:  # noqa: BLE001 (what is left does not count as a checkpoint)
            self.say(f"warning: {folder} could not be removed ({reason(second)})")


class _Summed:
    """Passes bytes on to a file, keeping their number and checksum."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._bytes, self._sum = 0, xxhash.xxh3_64()

    def write(self, data: bytes | memoryview) -> int:
        self._file.write(data)
        size = memoryview(data).nbytes
        self._bytes += size
        self._sum.update(data)
        return size

    def info(self) -> dict[str, int | str]:
        return {"bytes": self._bytes, "xxh3": self._sum.hexdigest()}


def write_parts(stem: Path, held: Held, say: Callable[[str], None]) -> None:
    """Write one host's files of a checkpoint; the last, ``.sums``, says that the others are whole.

    Args:
        say: told of each further try to write one.
    """
    folder, found, index = stem.parent, {}, {}
    for name, (shape, dtype, pieces) in held.items():
        parts = []
        for number, (place, part) in enumerate(pieces):
            key = f"{name}#{number}"
            found[key] = part
            parts.append(Part(key=key, start=[s.start for s in place], stop=[s.stop for s in place]))
        index[name] = Stored(shape=tuple(shape), dtype=str(dtype).removeprefix("torch."), parts=parts)
    # Wider types first, so that each tensor is aligned.
    found = dict(sorted(found.items(), key=lambda item: -item[1].dtype.itemsize))
    entries = {key: Entry(part.dtype, tuple(part.shape)) for key, part in found.items()}
    make_folder(folder)
    writers = {
        "safetensors": lambda file: write_tensors(file, entries, found.values()),
        "json": lambda file: file.write(INDEX.dump_json(index)),
    }
    sums = {}
    for kind, write in writers.items():
        path = folder / f"{stem.name}.{kind}"
        sums[path.name] = retried(partial(_write, path, write), f"checkpoint {folder}", say)
    replace_text(folder / f"{stem.name}.sums", json.dumps(sums))


def _write(path: Path, action: Callable[[Any], Any]) -> dict[str, int | str]:
    with path.open("wb") as file:
        summed = _Summed(file)
        action(summed)
    sync(path)
    return summed.info()
