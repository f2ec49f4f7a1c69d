"""A model on its devices, one parameter at a time: a host never holds more than one whole parameter."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from gemma_xla.backend import Backend
from gemma_xla.hf import TensorReader
from gemma_xla.model.config import GemmaConfig
from gemma_xla.model.gemma import Gemma, init_parameter
from gemma_xla.sharding import PARAMETER_RULES, MeshShape, Spec, check_heads, match

# Makes the parameter of a name and shape, placed as a spec says.
Make = Callable[[str, torch.Size, Spec], torch.Tensor]


def build_model(config: GemmaConfig, backend: Backend, make: Make, attention: str) -> tuple[Gemma, dict[str, Spec]]:
    """Return a float32 model placed on the backend's devices, and how each of its parameters is split.

    Args:
        config: the architecture.
        backend: where it lives.
        make: `initial` or `stored`.
        attention: a key of `gemma_xla.model.attention.IMPLEMENTATIONS`.

    Raises:
        UserError: the mesh does not suit the model.
    """
    specs = plan_shards(config, backend.mesh)
    with torch.device("meta"):
        model = Gemma(config, attention)
    for name, parameter in list(model.named_parameters()):
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, nn.Parameter(make(name, parameter.shape, specs[name])))
    return model, specs


def initial(config: GemmaConfig, backend: Backend, seed: int) -> Make:
    """Random starting values."""

    def make(name: str, shape: torch.Size, spec: Spec) -> torch.Tensor:
        values = torch.empty(shape, dtype=torch.float32)
        init_parameter(name, values, config, seed)
        return backend.place(values, spec)

    return make


def stored(reader: TensorReader, backend: Backend, prefix: str = "") -> Make:
    """The values that a folder or checkpoint holds under ``prefix`` and the name; each host reads its part alone."""

    def make(name: str, shape: torch.Size, spec: Spec) -> torch.Tensor:
        name = prefix + name
        return backend.place_from(shape, spec, partial(reader.copy_to, name), reader.dtype(name))

    return make


def plan_shards(config: GemmaConfig, mesh: MeshShape) -> dict[str, Spec]:
    """How each parameter of a model is split over a mesh.

    Raises:
        UserError: the mesh does not suit the model.
    """
    check_heads(config, mesh)
    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in Gemma(config).named_parameters()}
    return match(PARAMETER_RULES, shapes, mesh, config)
