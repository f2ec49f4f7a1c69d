"""What is set before PyTorch/XLA starts: the TPU compiler's settings, after which the user's own go; freed memory."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys

import pytest

from gemma_xla.tpu_flags import FLAGS, libtpu_arguments
from gemma_xla.xla import configure_environment


def parsed(arguments: str) -> dict[str, str]:
    found = [re.fullmatch(r"--(\w+)=(\w+)", argument) for argument in arguments.split()]
    assert all(found)
    assert len({one[1] for one in found}) == len(found)
    return {one[1]: one[2] for one in found}


def test_without_any_given_they_are_ours():
    assert parsed(libtpu_arguments()) == FLAGS


def test_given_ones_stay():
    name = "xla_tpu_scoped_vmem_limit_kib"
    assert parsed(libtpu_arguments(f"--xla_other=1  --{name}=4096")) == FLAGS | {name: "4096", "xla_other": "1"}


def test_twice_is_once():
    assert parsed(libtpu_arguments(libtpu_arguments())) == FLAGS


@pytest.mark.parametrize("given", [None, "--xla_tpu_scoped_vmem_limit_kib=4096"])
def test_a_run_sets_them(monkeypatch, given):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", given or "")
    # What else it sets is put back.
    for name in ("TF_CPP_MIN_LOG_LEVEL", "PJRT_DEVICE", "CPU_NUM_DEVICES"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    configure_environment(None)
    assert os.environ["LIBTPU_INIT_ARGS"] == libtpu_arguments(given or "")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="asks the GNU C library, from 2.33 on")
@pytest.mark.parametrize(("devices", "kept"), [(1, True), (None, False)])
def test_memory_that_is_freed_is_kept_where_devices_are_simulated(devices, kept):
    # Read in the allocator's own books: page faults, and memory in use, depend on what lies above a block in the heap.
    program = f"""
import ctypes
from gemma_xla.xla import configure_environment
configure_environment({devices})
library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]
class Books(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena 1 2 hblks 4 5 6 7 8 9".split()]
library.mallinfo2.restype = Books
for mebibytes in (31, 64):
    before = library.mallinfo2()
    block = library.malloc(mebibytes * 2**20)
    held = library.mallinfo2()
    library.free(block)
    print(held.hblks - before.hblks, (held.arena - library.mallinfo2().arena) // 2**20)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    # Whether a block has a mapping of its own, which goes back to the kernel with it; by how much the heap shrinks.
    assert done.stdout.splitlines() == ["0 0" if kept else "1 0", "1 0"]
