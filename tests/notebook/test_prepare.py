"""What a notebook's runs go through."""

from __future__ import annotations

import os

import pytest
import torch

from gemma_xla import notebook

SET = ("USE_TORCH_XLA", "ACCELERATE_USE_CPU", "LIBTPU_INIT_ARGS", "TF_CPP_MIN_LOG_LEVEL")


@pytest.fixture(autouse=True)
def devices(tmp_path, monkeypatch):
    """The folder of device files; the environment says nothing, and is put back afterwards."""
    for name in SET:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(notebook, "_TPU_DEVICES", (f"{tmp_path}/accel[0-9]*",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return tmp_path


def said() -> dict[str, str]:
    return {name: os.environ[name] for name in SET if name in os.environ}


def test_without_a_tpu_runs_are_plain_pytorch(devices):
    (devices / "accelerometer").touch()
    notebook.prepare()
    assert said() == {"USE_TORCH_XLA": "0"}


def test_the_user_may_want_xla_all_the_same(monkeypatch):
    monkeypatch.setenv("USE_TORCH_XLA", "1")
    notebook.prepare()
    assert said() == {"USE_TORCH_XLA": "1"}


def test_a_tpu_is_used_with_the_compilers_settings(devices):
    (devices / "accel0").touch()
    notebook.prepare()
    assert "USE_TORCH_XLA" not in said()
    assert "--xla_tpu" in said()["LIBTPU_INIT_ARGS"]


@pytest.mark.parametrize(("name", "cpu"), [("NVIDIA H200", False), ("Tesla T4", True)])
def test_a_gpu_is_used_if_its_peak_is_known(monkeypatch, capsys, name, cpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    notebook.prepare()
    assert said() == {"USE_TORCH_XLA": "0", **({"ACCELERATE_USE_CPU": "1"} if cpu else {})}
    assert (f"has no {name!r}" in capsys.readouterr().out) == cpu
