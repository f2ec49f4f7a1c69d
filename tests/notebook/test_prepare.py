"""What a notebook's runs go through."""

from __future__ import annotations

import os

import pytest

from gemma_xla import notebook


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setattr(os, "environ", {})


def test_without_a_tpu_runs_are_plain_pytorch(tmp_path, monkeypatch):
    monkeypatch.setattr(notebook, "_TPU_DEVICES", (f"{tmp_path}/accel[0-9]*",))
    (tmp_path / "accelerometer").touch()
    notebook.prepare()
    assert os.environ == {"USE_TORCH_XLA": "0"}


def test_the_user_may_want_xla_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(notebook, "_TPU_DEVICES", (f"{tmp_path}/accel[0-9]*",))
    os.environ["USE_TORCH_XLA"] = "1"
    notebook.prepare()
    assert os.environ == {"USE_TORCH_XLA": "1"}


def test_a_tpu_is_used_with_the_compilers_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(notebook, "_TPU_DEVICES", (f"{tmp_path}/accel[0-9]*",))
    (tmp_path / "accel0").touch()
    notebook.prepare()
    assert "USE_TORCH_XLA" not in os.environ
    assert "--xla_tpu" in os.environ["LIBTPU_INIT_ARGS"]
