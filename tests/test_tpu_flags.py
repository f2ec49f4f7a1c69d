"""The TPU compiler's settings reach it, and the user's own go before ours."""

from __future__ import annotations

import os
import re

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
