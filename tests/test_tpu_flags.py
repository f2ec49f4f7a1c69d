"""What is set before PyTorch/XLA starts: the TPU compiler's settings, after which the user's own go; freed memory."""

from __future__ import annotations

import os
import platform
import re
import resource
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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries cannot be told")
@pytest.mark.parametrize(("devices", "kept"), [(1, True), (None, False)])
def test_memory_that_is_freed_is_kept_where_devices_are_simulated(devices, kept):
    program = f"""
import resource
from gemma_xla.xla import configure_environment
configure_environment({devices})
import torch
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    buffers = [torch.ones(2**21) for _ in range(32)]
    del buffers
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    pages = 32 * 2**23 / resource.getpagesize()
    assert (int(done.stdout) < 0.5 * pages) == kept
