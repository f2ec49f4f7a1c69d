"""A model on its devices, one parameter at a time: a host never holds more than one whole parameter."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from gemma_xla.backend import Backend
from gemma_xla.model.config import GemmaConfig
from gemma_xla.model.gemma import Gemma
from gemma_xla.sharding import PARAMETER_RULES, MeshShape, Spec, check_heads, match


def build_model(
    config: GemmaConfig, backend: Backend, fill: Callable[[str, torch.Tensor], None], attention: str
) -> tuple[Gemma, dict[str, Spec]]:
    """Return a float32 model placed on the backend's devices, and how each of its parameters is split.

    Args:
        config: the architecture.
        backend: where it lives.
        fill: writes the starting values of the named parameter into an uninitialised CPU tensor.
        attention: a key of `gemma_xla.model.attention.IMPLEMENTATIONS`.

    Raises:
        UserError: the mesh does not suit the model.
    """
    specs = plan_shards(config, backend.mesh)
    with torch.device("meta"):
        model = Gemma(config, attention)
    for name, parameter in list(model.named_parameters()):
        values = torch.empty(parameter.shape, dtype=torch.float32)
        fill(name, values)
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, nn.Parameter(backend.place(values, specs[name])))
    return model, specs


def plan_shards(config: GemmaConfig, mesh: MeshShape) -> dict[str, Spec]:
    """How each parameter of a model is split over a mesh.

    Raises:
        UserError: the mesh does not suit the model.
    """
    check_heads(config, mesh)
    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in Gemma(config).named_parameters()}
    return match(PARAMETER_RULES, shapes, mesh, config)
