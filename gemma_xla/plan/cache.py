"""Answers kept under what decides them, so that the same question is not worked out twice.

An entry is a folder that is renamed into place when it is whole: whoever reads sees all of it or nothing.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from gemma_xla.errors import UserError
from gemma_xla.plan.report import from_json, to_json
from gemma_xla.plan.result import Plan
from gemma_xla.plan.setup import Setup
from gemma_xla.storage import reason

_PACKAGES = ("torch", "torch_xla", "jax", "jaxlib", "libtpu")


def versions() -> dict[str, str]:
    """Of the packages that decide what is compiled; those that are absent are left out."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


class Cache:
    """A folder of answers."""

    def __init__(self, folder: Path | None = None) -> None:
        """
        Args:
            folder: None: the user's cache folder.

        Raises:
            UserError: it cannot be written to.
        """
        self.folder = folder or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemma_xla" / "plan"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise UserError(
                f"--cache: {self.folder} cannot be written to ({reason(error)}); name another folder"
            ) from error

    def load(self, setup: Setup) -> Plan | None:
        """The answer to a question, if it is there."""
        path = self._entry(setup) / "plan.json"
        try:
            return from_json(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, UserError) as error:
            raise UserError(f"--cache: {path} is damaged ({error}); delete it") from error

    def save(self, setup: Setup, plan: Plan, programs: list[str]) -> None:
        """Keep an answer, and the compiled programs it is from."""
        partial = Path(tempfile.mkdtemp(dir=self.folder, prefix="."))
        try:
            (partial / "plan.json").write_text(json.dumps(to_json(plan)), encoding="utf-8")
            for number, program in enumerate(programs):
                with gzip.open(partial / f"{number}.hlo.txt.gz", "wt", compresslevel=3) as file:
                    file.write(program)
            try:
                partial.rename(self._entry(setup))
            except OSError:
                # Somebody else had the same question: the answers are equal.
                if not self._entry(setup).exists():
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def programs(self, setup: Setup) -> list[str]:
        """The compiled programs that an answer is from, in the order in which a step runs them."""
        found = sorted(self._entry(setup).glob("*.hlo.txt.gz"), key=lambda path: int(path.name.partition(".")[0]))
        return [gzip.decompress(path.read_bytes()).decode() for path in found]

    def _entry(self, setup: Setup) -> Path:
        return self.folder / key(setup)


def key(setup: Setup) -> str:
    """What decides an answer, as a digest."""
    train = setup.config.train.model_dump(exclude={"steps", "epochs", "schedule"})
    lora = setup.config.lora
    question = {
        "code": _code(),
        "versions": versions(),
        "slice": [setup.hardware.slice.name, setup.hardware.count, asdict(setup.hardware.mesh)],
        "model": asdict(setup.model),
        "attention": setup.config.model.attention,
        "lora": lora and lora.model_dump(),
        "seq_len": setup.config.data.seq_len,
        "train": train,
        "notes": setup.notes,
    }
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:32]


@cache
def _code() -> str:
    """A digest of this package's own source."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()
