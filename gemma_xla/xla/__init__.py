"""The seam: the only package that imports torch_xla. A move to its successor touches these few files alone.

One process drives all the devices of its host (SPMD): tensors look whole, and the compiler splits the work as their
sharding says (GSPMD, arXiv:2105.04663).
"""

from __future__ import annotations

import contextlib
import ctypes
import os

import torch

from gemma_xla.backend import Backend
from gemma_xla.config import MeshSection
from gemma_xla.tpu_flags import libtpu_arguments

# Of glibc's `mallopt`.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
# The most that it takes.
_LARGE = 32 * 2**20


def configure_environment(virtual_devices: int | None) -> None:
    """Prepare the environment that torch_xla reads when it is first used; call this before it is imported."""
    # Errors only: the compiler warns of its own deprecations once for every graph. 1 is what torch_xla sets by itself,
    # and a launcher that has imported it hands that down.
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL") in (None, "1"):
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    os.environ["LIBTPU_INIT_ARGS"] = libtpu_arguments(os.environ.get("LIBTPU_INIT_ARGS", ""))
    if virtual_devices is None:
        return
    os.environ["PJRT_DEVICE"] = "CPU"
    os.environ["CPU_NUM_DEVICES"] = str(virtual_devices)
    _keep_memory()


def _keep_memory() -> None:
    """Have the C library keep what is freed, but for large buffers; of use before threads begin.

    Otherwise the devices' buffers go back to the kernel after each step, and come page by page in the next: half a
    million page faults and 3 to 4 CPU-seconds in each step of benchmarks/train_step.py. Were large ones kept too, the
    others would be cut to pieces around them: 5.5 GB instead of 3.7 there, and no faster.
    """
    # Other C libraries have no such function.
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((_M_MMAP_THRESHOLD, _LARGE), (_M_TRIM_THRESHOLD, -1), (_M_ARENA_MAX, 1)):
            mallopt(option, value)


def open_backend(section: MeshSection, *, use_xla: bool, device: torch.device | None = None) -> Backend:
    """Return the backend of this machine.

    Args:
        section: the config's ``mesh``.
        use_xla: whether to run through PyTorch/XLA.
        device: the device of a run without it; None: that which accelerate chooses for this process.

    Raises:
        UserError: the mesh does not fit the devices.
    """
    if use_xla:
        configure_environment(section.virtual_devices)
        # It loads torch_xla, which takes seconds and reads the environment.
        from gemma_xla.xla.backend import XlaBackend

        return XlaBackend(section)
    # It loads accelerate, which takes seconds.
    from gemma_xla.distributed import open_torch

    return open_torch(section, device)
