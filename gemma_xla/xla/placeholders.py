"""Devices that are not there: what a step records on them can be compiled, but not run.

A placeholder has a shape and a type but no values, and takes no memory. Reading one ends the process, so use this in a
process of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch_xla
import torch_xla.core.xla_builder as xb
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr

from gemma_xla.chips import Chip
from gemma_xla.sharding import MeshShape, Spec
from gemma_xla.xla.backend import XlaBackend
from gemma_xla.xla.tpu import record_for_tpu


@dataclass(frozen=True)
class Argument:
    """An input of a graph.

    Attributes:
        kind: parameters, optimizer, gradients, batch or scalars.
        sharding: how it is split, in HLO's notation; empty: as the compiler likes.
        shard_bytes: of the part that a device holds.
    """

    kind: str
    sharding: str
    shard_bytes: int


@dataclass(frozen=True)
class Graph:
    """One recorded computation, as the compiler takes it.

    Attributes:
        hlo: a serialized HloModuleProto.
        arguments: by parameter number; what is not there is a constant of the host, whole everywhere.
        results: how each result is split.
        aliases: parameter number -> number of the result that takes its place in memory.
    """

    hlo: bytes
    arguments: dict[int, Argument]
    results: list[str]
    aliases: dict[int, int]


@dataclass(frozen=True)
class _Held:
    tensor: torch.Tensor
    placeholder: torch.Tensor
    argument: Argument


class PlaceholderBackend(XlaBackend):
    """A slice without the slice."""

    def __init__(self, mesh: MeshShape, chip: Chip | None) -> None:
        """
        Args:
            mesh: its devices.
            chip: which TPUs they are, which have kernels of their own; None: CPUs.
        """
        xr.use_spmd()
        if chip is not None:
            record_for_tpu(chip)
        # One CPU stands for all devices: autograd cannot tell more than 127 apart.
        xr.global_runtime_device_count = lambda: mesh.num_devices
        torch_xla._XLAC._init_computation_client()
        self._lay_out(mesh)
        # By the identity of what was handed out.
        self._held: dict[int, _Held] = {}

    def place(self, tensor: torch.Tensor, spec: Spec) -> torch.Tensor:
        return self.placeholder(tensor.shape, tensor.dtype, spec, "scalars")

    def place_batch(self, batch: dict[str, torch.Tensor], spec: Spec) -> dict[str, torch.Tensor]:
        return {name: self.placeholder(values.shape, values.dtype, spec, "batch") for name, values in batch.items()}

    def zeros_like(self, tensor: torch.Tensor, spec: Spec) -> torch.Tensor:
        return self.placeholder(tensor.shape, tensor.dtype, spec, "optimizer")

    def placeholder(self, shape: torch.Size, dtype: torch.dtype, spec: Spec, kind: str) -> torch.Tensor:
        """A tensor without values, split as ``spec`` says."""
        placeholder = xb.create_placeholder_tensor(shape, dtype)
        # It begins as the placeholder's own node, which can be found again when the tensor has changed.
        tensor = placeholder.clone()
        # A placeholder itself takes no annotation.
        xs.annotate_custom_sharding(tensor, self._mesh, spec)
        shard_bytes = math.prod(shape) * dtype.itemsize // math.prod(map(self.mesh.ways, spec))
        argument = Argument(kind, torch_xla._XLAC._get_xla_sharding_spec(tensor), shard_bytes)
        self._held[id(tensor)] = _Held(tensor, placeholder, argument)
        return tensor

    def capture(
        self, results: list[torch.Tensor], state: list[tuple[torch.Tensor, torch.Tensor]] | None = None
    ) -> Graph:
        """Return what has been recorded.

        Args:
            results: what is to be computed.
            state: pairs of a tensor of `placeholder` and what it has become, which takes its place in memory; they are
                results too, after the others.
        """
        state = state or []
        results = [*results, *(now for _, now in state)]
        context = torch_xla._XLAC.lowering.LoweringContext("step")
        context.set_name_string("step")
        context.build(results)
        numbers = {key: context.tensor_parameter_id(held.placeholder) for key, held in self._held.items()}
        return Graph(
            hlo=context.hlo(),
            arguments={n: self._held[key].argument for key, n in numbers.items() if n >= 0},
            results=[torch_xla._XLAC._get_xla_sharding_spec(tensor) for tensor in results],
            aliases={numbers[id(old)]: i for i, (old, _) in enumerate(state, len(results) - len(state))},
        )
