"""A model on its devices, one parameter at a time: a host never holds more than one whole parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from gemma_xla.backend import Backend
from gemma_xla.config import LoraSection
from gemma_xla.hf import TensorReader
from gemma_xla.model.config import GemmaConfig
from gemma_xla.model.gemma import Gemma, init_parameter
from gemma_xla.model.lora import add_adapters, init_adapter, is_adapter, row_lengths
from gemma_xla.sharding import PARAMETER_RULES, MeshShape, Spec, adapter_rules, check_heads, match

# Makes the parameter of a name and shape, placed as a spec says, of a dtype.
Make = Callable[[str, torch.Size, Spec, torch.dtype], torch.Tensor]


def build_model(
    config: GemmaConfig,
    backend: Backend,
    make: Make,
    attention: str,
    lora: LoraSection | None = None,
    frozen_dtype: torch.dtype = torch.float32,
) -> tuple[Gemma, dict[str, Spec]]:
    """Return a model placed on the backend's devices, and how each of its parameters is split.

    What is trained is float32.

    Args:
        config: the architecture.
        backend: where it lives.
        make: `initial`, `stored` or `adapted`.
        attention: a key of `gemma_xla.model.attention.IMPLEMENTATIONS`.
        lora: train adapters alone.
        frozen_dtype: of the matrices that are not trained.

    Raises:
        UserError: the mesh does not suit the model.
    """
    specs = plan_shards(config, backend.mesh, lora)
    model = empty_model(config, attention, lora)
    for name, parameter in list(model.named_parameters()):
        path, _, leaf = name.rpartition(".")
        values = make(name, parameter.shape, specs[name], stored_dtype(parameter, frozen_dtype))
        setattr(model.get_submodule(path), leaf, nn.Parameter(values, requires_grad=parameter.requires_grad))
    return model, specs


def initial(config: GemmaConfig, backend: Backend, seed: int) -> Make:
    """Random starting values."""

    def make(name: str, shape: torch.Size, spec: Spec, dtype: torch.dtype) -> torch.Tensor:
        values = torch.empty(shape, dtype=torch.float32)
        init_parameter(name, values, config, seed)
        return backend.place(values.to(dtype), spec)

    return make


def stored(reader: TensorReader, backend: Backend, prefix: str = "") -> Make:
    """The values that a folder or checkpoint holds under ``prefix`` and the name; each host reads its part alone."""

    def make(name: str, shape: torch.Size, spec: Spec, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        name = prefix + name
        return backend.place_from(shape, spec, partial(reader.copy_to, name), reader.dtype(name), out=dtype)

    return make


def adapted(base: TensorReader, backend: Backend, seed: int, adapters: Make | None = None) -> Make:
    """Frozen weights from ``base`` beside ``adapters`` or, where there are none yet, new ones that change nothing."""
    frozen = stored(base, backend)

    def make(name: str, shape: torch.Size, spec: Spec, dtype: torch.dtype) -> torch.Tensor:
        if not is_adapter(name):
            frozen_dtypes[name] = dtype
            return frozen(name, shape, spec, dtype)
        if adapters is not None:
            return adapters(name, shape, spec, dtype)
        if name.endswith("lora_magnitude_vector"):
            # Of the weight as it is kept, or the adapter would begin as something.
            weight = name.replace("lora_magnitude_vector", "weight")
            values = row_lengths(base.read(weight).to(frozen_dtypes[weight]).float())
        else:
            values = torch.empty(shape, dtype=dtype)
            init_adapter(name, values, seed)
        return backend.place(values, spec)

    frozen_dtypes: dict[str, torch.dtype] = {}
    return make


def plan_shards(config: GemmaConfig, mesh: MeshShape, lora: LoraSection | None = None) -> dict[str, Spec]:
    """How each parameter of a model is split over a mesh.

    Raises:
        UserError: the mesh does not suit the model.
    """
    check_heads(config, mesh)
    shapes = {name: tuple(parameter.shape) for name, parameter in empty_model(config, "sdpa", lora).named_parameters()}
    rules = (*PARAMETER_RULES, *(adapter_rules(lora) if lora else ()))
    return match(rules, shapes, mesh, config)


def trained(model: Gemma) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that are trained, with their names."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def stored_dtype(parameter: nn.Parameter, frozen_dtype: torch.dtype) -> torch.dtype:
    """What a parameter is kept in: norms, a few kilobytes each, and what is trained in float32."""
    return torch.float32 if parameter.requires_grad or parameter.dim() == 1 else frozen_dtype


def empty_model(config: GemmaConfig, attention: str, lora: LoraSection | None) -> Gemma:
    """A model whose parameters have no values: it takes no memory."""
    with torch.device("meta"):
        model = Gemma(config, attention)
        if lora:
            add_adapters(model, lora)
    return model
