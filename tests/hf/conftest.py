"""A tiny Gemma of transformers, its weights, and its folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from tests.reference import SHAPES, ours_from, reference_model

# Token ids differ from the defaults, as the other constants of SHAPES do.
CONFIG = dataclasses.replace(SHAPES["gqa-16"], pad_token_id=3, eos_token_id=4, bos_token_id=5, initializer_range=0.03)


class Weights:
    """A reader of tensors in memory, as a checkpoint might be."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def names(self):
        return list(self.tensors)

    def shape(self, name):
        return tuple(self.tensors[name].shape)

    def dtype(self, name):
        return self.tensors[name].dtype

    def where(self, name):
        return f"memory, {name}"

    def read(self, name, index=None):
        return self.tensors[name][index or ...]

    def copy_to(self, name, out, index=None):
        out.copy_(self.read(name, index))


@pytest.fixture(scope="module")
def theirs():
    return reference_model(CONFIG)


@pytest.fixture(scope="module")
def weights(theirs):
    return Weights(ours_from(theirs, CONFIG, "sdpa").state_dict())


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory) -> Path:
    """A folder that `transformers` wrote; copy it before changing it."""
    path = tmp_path_factory.mktemp("hf") / "theirs"
    theirs.save_pretrained(path)
    return path
