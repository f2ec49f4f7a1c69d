"""What notebooks show beside what the library reports anyway: shapes, attention maps, FLOPs and MFU."""

from __future__ import annotations

import glob
import os

from gemma_xla.xla import configure_environment

# Where the driver of a TPU shows itself.
_TPU_DEVICES = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")


def prepare() -> None:
    """Choose what runs in this notebook go through; call it first, before anything of training is imported.

    With a TPU that is PyTorch/XLA, which keeps the TPU to itself until the kernel ends. Without one it is plain
    PyTorch, on a GPU if there is one: on a CPU, a run of seconds would mostly compile. USE_TORCH_XLA in the environment
    overrides it.
    """
    if not any(map(glob.glob, _TPU_DEVICES)):
        os.environ.setdefault("USE_TORCH_XLA", "0")
    else:
        configure_environment(virtual_devices=None)
