"""What a run happens on, for its records."""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from gemma_xla.backend import Backend
from gemma_xla.train.resume import flatten

_PACKAGES = ("gemma_xla", "torch", "torch_xla", "transformers", "datasets", "accelerate", "safetensors")


def environment(backend: Backend) -> dict[str, Any]:
    """Return the versions, machine and devices of this start."""
    return {
        "command": sys.argv,
        "python": sys.version,
        "platform": platform.platform(),
        "backend": backend.name,
        "device": backend.device_kind,
        "devices": backend.mesh.num_devices,
        "hosts": backend.process_count,
        "mesh": dataclasses.asdict(backend.mesh),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Those of the packages that decide what a run computes."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def loggable(tree: dict[str, Any]) -> dict[str, Any]:
    """Dotted names to values that TensorBoard can store."""
    plain = int, float, str, bool
    return {key: value if isinstance(value, plain) else json.dumps(value) for key, value in flatten(tree).items()}
