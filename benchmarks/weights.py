"""What it costs to read and write weights: time beside that of a plain copy of the files, and memory.

    python benchmarks/weights.py
    python benchmarks/weights.py --layers 2 --xla 0

Makes a bfloat16 checkpoint of the shape of Gemma 2B (5 GB in shards), copies its files, imports it into a float32 model
in plain PyTorch and on virtual devices, and exports it again. Every import and every exported tensor is compared with
the original, bit by bit; exits with 1 when one differs.

Before a file is timed it leaves the page cache, and what is written is on the disk before the clock stops. GB/s count
the bytes of the bfloat16 files. "beside" is the most anonymous memory (RssAnon, looked at every few milliseconds) that
a process had beyond what it had before, less the float32 parameters it had begun to place by then; the pages of files
are not in it. "peak" is the kernel's own account (VmHWM), less what the process had before and the whole model. Takes
13 GB of memory and 11 GB of disk, in a few minutes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from gemma_xla.backend import Backend
from gemma_xla.config import MeshSection
from gemma_xla.hf import HfReader, export, read_config
from gemma_xla.model.config import GemmaConfig, preset
from gemma_xla.model.gemma import Gemma
from gemma_xla.train.build import build_model, stored
from gemma_xla.xla import open_backend

DTYPE = "bfloat16"
SHARD = "2GB"
# Rows of a tensor that are compared at once.
ROWS = 4096


class RandomBlock:
    """A reader of a model whose tensors all repeat one block of random values, each from another place on."""

    def __init__(self, config: GemmaConfig) -> None:
        with torch.device("meta"):
            self.shapes = {name: tuple(p.shape) for name, p in Gemma(config).named_parameters()}
        self.block = torch.randn(2**23 + 1, generator=torch.Generator().manual_seed(0)).bfloat16()

    def names(self) -> list[str]:
        return list(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self.block.dtype

    def copy_to(self, name: str, out: torch.Tensor, index: Any = None) -> None:
        block = self.block.roll(7919 * self.names().index(name))
        for part in out.view(-1).split(len(block)):
            part.copy_(block[: len(part)])


class Parameters(RandomBlock):
    """A reader of a model in memory."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.parameters = dict(model.named_parameters())
        self.shapes = {name: tuple(p.shape) for name, p in self.parameters.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self.parameters[name].dtype

    def copy_to(self, name: str, out: torch.Tensor, index: Any = None) -> None:
        out.copy_(self.parameters[name].detach())


class Memory:
    """The most that this process holds beyond what it held at first and what it is meant to hold."""

    def __init__(self) -> None:
        self.before, self.meant, self.beside, self.running = memory("RssAnon"), 0, 0, True
        # The high-water mark starts anew from here.
        Path("/proc/self/clear_refs").write_text("5")
        self.resident = memory("VmRSS")
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while self.running:
            self.beside = max(self.beside, memory("RssAnon") - self.before - self.meant)
            time.sleep(0.003)

    def figures(self) -> dict[str, float]:
        self.running = False
        return {"beside": self.beside, "peak": memory("VmHWM") - self.resident - self.meant}


def memory(field: str) -> int:
    """A line of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def total(folder: Path) -> int:
    """The bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.iterdir())


def sync(folder: Path, forget: bool = False) -> None:
    """Wait until a folder's files are on the disk; then let them leave the page cache."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            if forget:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(folder: Path, out: Path) -> None:
    out.mkdir()
    for path in folder.iterdir():
        shutil.copyfile(path, out / path.name)
    sync(out)


def read(folder: Path, _: Path) -> None:
    buffer = bytearray(2**23)
    for path in folder.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def allocate(folder: Path, _: Path) -> None:
    """What no import can do without: the system gives memory for the float32 parameters."""
    torch.empty(total(folder) // 2).zero_()


def baseline(folder: Path, out: Path, action: Callable[[Path, Path], None]) -> dict[str, Any]:
    start = time.perf_counter()
    action(folder, out)
    return {"seconds": time.perf_counter() - start}


def load(folder: Path, devices: int) -> tuple[torch.nn.Module, Backend, dict[str, Any]]:
    """A model of the folder's weights, on so many virtual devices or, for 0, in plain PyTorch."""
    section = MeshSection(virtual_devices=devices or None)
    backend = open_backend(section, use_xla=devices > 0, device=torch.device("cpu"))
    used = backend.place(torch.zeros(64, 64), ("fsdp", None))  # what the runtime needs for itself
    watch = Memory()
    start = time.perf_counter()
    from_file = stored(HfReader(folder), backend)

    def counted(name: str, shape: torch.Size, spec: Any) -> torch.Tensor:
        watch.meant += 4 * shape.numel()
        return from_file(name, shape, spec)

    model, _ = build_model(read_config(folder), backend, counted, "sdpa")
    backend.pieces(used)  # waits for the devices
    return model, backend, {"seconds": time.perf_counter() - start} | watch.figures()


def import_(folder: Path, out: Path, devices: int = 0) -> dict[str, Any]:
    model, backend, figures = load(folder, devices)
    reader = HfReader(folder)
    equal = True
    for name, parameter in model.named_parameters():
        for (rows, *columns), values in backend.pieces(parameter):
            for i, part in enumerate(values.split(ROWS)):
                start = rows.start + i * ROWS
                expected = reader.read(name, (slice(start, start + len(part)), *columns))
                equal = equal and torch.equal(part, expected.float())
    return figures | {"equal": equal}


def export_(folder: Path, out: Path) -> dict[str, Any]:
    model, _, _ = load(folder, 0)
    watch = Memory()
    start = time.perf_counter()
    export(Parameters(model), read_config(folder), out, dtype=DTYPE, max_shard_size=SHARD)
    sync(out)
    seconds = time.perf_counter() - start
    return {"seconds": seconds} | watch.figures() | {"equal": same_files(folder, out)}


def same_files(one: Path, other: Path) -> bool:
    """Whether safetensors finds equal bytes in the same files under the same names."""
    files = [sorted(path.name for path in folder.glob("*.safetensors")) for folder in (one, other)]
    return files[0] == files[1] and all(same_tensors(one / file, other / file) for file in files[0])


def same_tensors(one: Path, other: Path) -> bool:
    with safe_open(one, framework="pt") as a, safe_open(other, framework="pt") as b:
        names = sorted(a.keys())
        return names == sorted(b.keys()) and all(
            torch.equal(a.get_tensor(name).view(torch.int16), b.get_tensor(name).view(torch.int16)) for name in names
        )


def in_process(action: Callable[..., dict[str, Any]], folder: Path, *args: Any) -> dict[str, Any]:
    """The figures of an action in a process of its own, on files that are not in the page cache."""
    sync(folder, forget=True)
    parent = tempfile.TemporaryDirectory(dir=folder.parent)
    with parent, multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(action, (folder, Path(parent.name) / "out", *args))


def report(name: str, size: int, largest: int, figures: dict[str, Any]) -> None:
    row = f"{name:32}{figures['seconds']:8.1f}{size / figures['seconds'] / 1e9:8.2f}"
    if "beside" in figures:
        row += f"{figures['beside'] / 1e6:10.0f}{figures['beside'] / largest:9.2f}{figures['peak'] / 1e6:10.0f}"
        row += "   yes" if figures.get("equal") else "   NO"
    print(row, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="gemma-2b")
    parser.add_argument("--layers", type=int, help="number of layers, to make it smaller")
    parser.add_argument("--xla", type=int, default=4, metavar="N", help="virtual devices (default: 4; 0: none)")
    parser.add_argument("--folder", type=Path, help="where the files go for the time (default: the system's place)")
    args = parser.parse_args()

    config = preset(args.preset).replace(**({"num_hidden_layers": args.layers} if args.layers else {}))
    results = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as parent:
        folder = Path(parent) / "model"
        export(RandomBlock(config), config, folder, dtype=DTYPE, max_shard_size=SHARD)
        size = total(folder)
        largest = 2 * config.vocab_size * config.hidden_size
        print(f"{size / 1e9:.2f} GB of {DTYPE}; x: times the largest tensor, {largest / 1e6:.0f} MB")
        print(f"{'':32}{'s':>8}{'GB/s':>8}{'beside MB':>10}{'x':>9}{'peak MB':>10}   equal")
        actions: dict[str, tuple] = {"read the files": (baseline, read), "copy the files": (baseline, copy)}
        actions |= {"allocate the model's memory": (baseline, allocate), "import, plain PyTorch": (import_,)}
        if args.xla:
            actions[f"import, {args.xla} virtual devices"] = (import_, args.xla)
        for name, (action, *more) in (actions | {"export, plain PyTorch": (export_,)}).items():
            results[name] = in_process(action, folder, *more)
            report(name, size, largest, results[name])
    return 0 if all(figures.get("equal", True) for figures in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
