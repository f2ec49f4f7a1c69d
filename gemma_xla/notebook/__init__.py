"""What notebooks show beside what the library reports anyway: shapes, attention maps, FLOPs and MFU."""

from __future__ import annotations

import glob
import os

import torch

from gemma_xla.chips import detect_gpu_chip
from gemma_xla.errors import UserError
from gemma_xla.xla import configure_environment

# Where the driver of a TPU shows itself.
_TPU_DEVICES = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")


def prepare() -> None:
    """Choose what runs in this notebook go through; call it first, before anything of training is imported.

    With a TPU that is PyTorch/XLA, which keeps the TPU to itself until the kernel ends. Without one it is plain
    PyTorch: on a CPU, a run of seconds would mostly compile. A GPU is used if the catalogue of chips has it, as there
    is no MFU without its peak. USE_TORCH_XLA and ACCELERATE_USE_CPU in the environment override this.
    """
    if any(map(glob.glob, _TPU_DEVICES)):
        configure_environment(virtual_devices=None)
        return
    os.environ.setdefault("USE_TORCH_XLA", "0")
    if torch.cuda.is_available() and "ACCELERATE_USE_CPU" not in os.environ:
        try:
            detect_gpu_chip(torch.cuda.get_device_name())
        except UserError as error:
            print(f"{error}. Until then, runs in this notebook use the CPU.")
            os.environ["ACCELERATE_USE_CPU"] = "1"
