"""Devices through PyTorch/XLA."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.debug.metrics as met
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr
from torch import nn

from gemma_xla.backend import Backend, Piece, narrower, part_of
from gemma_xla.config import MeshSection
from gemma_xla.errors import UserError
from gemma_xla.model.config import splash_takes
from gemma_xla.model.layers import GemmaAttention
from gemma_xla.model.linear import Dims
from gemma_xla.sharding import AXES, MeshShape, Spec, check_slices, resolve_mesh
from gemma_xla.xla.attention import use_heads_first, use_splash
from gemma_xla.xla.graph import Constrain, Fence, GatedGelu, MeshLayout, by_positions, fenced, scan_layers
from gemma_xla.xla.int8 import int8_dot, laid_out
from gemma_xla.xla.tpu import is_for_tpu

# The most elements of a tensor that a host makes wider by itself.
WIDE = 2**27
# As many of a product's outputs does a TPU compute at a time; what the product takes is found again for each so many.
_TILE = 2048


class XlaBackend(Backend):
    """All devices of a TPU slice, or several simulated on a CPU, as one mesh."""

    name = "xla"
    # By itself, whatever is recorded.
    compiles = False

    def __init__(self, section: MeshSection) -> None:
        xr.use_spmd()
        num_devices = xr.global_runtime_device_count()
        if section.virtual_devices not in (None, num_devices):
            raise UserError(
                f"mesh.virtual_devices is {section.virtual_devices} but this process already runs {num_devices} "
                "device(s); start it in a process of its own"
            )
        if section.virtual_devices is None and xr.device_type() == "CPU" and torch.cuda.is_available():
            raise UserError("PyTorch/XLA finds no TPU, but there is a GPU; start with USE_TORCH_XLA=0 to run on it")
        if (started := int(os.environ.get("WORLD_SIZE", "1"))) > xr.process_count():
            raise UserError(
                f"{started} processes were started, but PyTorch/XLA drives all devices of a host from one; start one "
                "per host, or start with USE_TORCH_XLA=0 to do without PyTorch/XLA"
            )
        mesh = resolve_mesh(section, num_devices)
        check_slices(mesh, _slices())
        self._lay_out(mesh)
        self.process_index = xr.process_index()
        self.process_count = xr.process_count()
        if self.process_count > 1:
            if self.mesh.tensor > 1:
                # A host's rows are dealt out to all of its devices, whatever their place on the tensor axis.
                raise UserError(f"mesh.tensor is {self.mesh.tensor}; with several hosts it must be 1")
            from torch_xla.distributed import xla_backend  # noqa: F401 (registers the address "xla://")

            torch.distributed.init_process_group("gloo", init_method="xla://")

    def _lay_out(self, mesh: MeshShape) -> None:
        self.device = torch_xla.device()
        self.mesh = mesh
        self.batch_shards = mesh.batch_shards
        self.loss_layout = MeshLayout(mesh)
        self._mesh = xs.Mesh(np.arange(mesh.num_devices), tuple(getattr(mesh, axis) for axis in AXES), AXES)
        xs.set_global_mesh(self._mesh)
        use_splash(mesh)

    @property
    def device_kind(self) -> str:
        kind = xr.device_type()
        if kind != "TPU":
            return kind.lower()
        return torch_xla.tpu.get_tpu_env()["ACCELERATOR_TYPE"]

    def attention(self, head_dim: int, seq_len: int) -> str:
        if not is_for_tpu():
            return "blocks"
        return "splash" if splash_takes(head_dim, seq_len) else "reference"

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.bfloat16 if is_for_tpu() else torch.float32

    def place(self, tensor: torch.Tensor, spec: Spec) -> torch.Tensor:
        # The transfer waits for the annotation, so each device receives its part alone.
        placed = tensor.to(self.device)
        xs.mark_sharding(placed, self._mesh, spec)
        return placed

    def place_from(self, shape, spec, copy_to, dtype=torch.float32, out=torch.float32) -> torch.Tensor:
        # Another type costs a compilation for each shape: only where it saves much memory.
        dtype = narrower(dtype, out) if math.prod(shape) > WIDE else out
        parts: dict[tuple, torch.Tensor] = {}
        shards = []
        for device in torch_xla._XLAC._xla_get_runtime_devices():
            index = part_of(shape, spec, self.mesh, int(device.rpartition(":")[2]))
            key = tuple((at.start, at.stop) for at in index)
            if key not in parts:
                parts[key] = torch.empty([stop - start for start, stop in key], dtype=dtype)
                copy_to(parts[key], index)
            shards.append(parts[key])
        sharding = self._mesh.get_op_sharding(spec)
        placed = torch_xla._XLAC._global_tensor_from_cpu_shards(shards, sharding, list(shape))
        if dtype != out:
            placed = placed.to(out)
            xs.mark_sharding(placed, self._mesh, spec)
            # Now, so that the devices do not hold both precisions of many tensors.
            torch_xla.sync()
        return placed

    def place_batch(self, batch: dict[str, torch.Tensor], spec: Spec) -> dict[str, torch.Tensor]:
        # With several hosts each one holds only its own rows; with one host it holds them all.
        sharding = xs.ShardingSpec(self._mesh, spec, minibatch=self.process_count > 1)
        placed = xm.send_cpu_data_to_device(list(batch.values()), self.device, sharding)
        return dict(zip(batch, placed, strict=True))

    def zeros_like(self, tensor: torch.Tensor, spec: Spec) -> torch.Tensor:
        zeros = torch.zeros_like(tensor)
        xs.mark_sharding(zeros, self._mesh, spec)
        return zeros

    def constrain(self, tensor: torch.Tensor, forward: Spec, backward: Spec) -> torch.Tensor:
        if self.mesh.num_devices == 1:
            return tensor
        return Constrain.apply(tensor, forward, backward)

    def fence_gradient(self, tensor: torch.Tensor) -> torch.Tensor:
        return Fence.apply(tensor)

    def made_once(self, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        # A CPU calls a library's function for each sine, which took 3% of a step: each layer made its own.
        return tensors if is_for_tpu() else tuple(fenced(tensor) for tensor in tensors)

    def suit_attention(self, attention: GemmaAttention) -> None:
        if is_for_tpu() and attention.impl == "splash":
            use_heads_first(attention, self.mesh)

    def gated_gelu(self, gate: torch.Tensor, up: torch.Tensor, outputs: int) -> torch.Tensor:
        return GatedGelu.apply(gate, up, outputs > _TILE)

    def int8_dot(self, left: torch.Tensor, right: torch.Tensor, dims: Dims) -> torch.Tensor:
        return int8_dot(left, right, dims, self.mesh)

    def laid_out(self, matrix: torch.Tensor, spec: Spec, *, turned: bool = False) -> torch.Tensor | None:
        return laid_out(matrix, spec, turned, self.mesh)

    def remat(self, function: Callable[..., torch.Tensor], *args, draws: bool = False) -> torch.Tensor:
        from torch_xla.utils.checkpoint import checkpoint

        return checkpoint(function, *args, preserve_rng_state=draws)

    def by_positions(
        self, function: Callable[..., tuple[torch.Tensor, ...]], position_ids_BT: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        return by_positions(function, position_ids_BT)

    def scan_layers(self, layers: nn.ModuleList, h, cos, sin, segment_ids, kept, draws=False) -> torch.Tensor:
        return scan_layers(layers, h, cos, sin, segment_ids, kept, draws)

    def optimizer_options(self) -> dict[str, bool]:
        # The step count lives on the device: bias correction is part of the graph, not a new constant in each step.
        return {"capturable": True}

    def scalar(self, value: float) -> torch.Tensor:
        # Placed like any tensor: a bare 0 or 1 would become a constant, and its graph another.
        return self.place(torch.tensor(value, dtype=torch.float32), ())

    def seed(self, seed: int) -> None:
        super().seed(seed)
        torch_xla.manual_seed(seed)

    def rng_state(self) -> dict[str, Any]:
        return super().rng_state() | {"xla": xm.get_rng_state()}

    def set_rng_state(self, state: dict[str, Any]) -> None:
        super().set_rng_state(state)
        if "xla" in state:
            xm.set_rng_state(state["xla"])

    def flush(self) -> None:
        torch_xla.sync()

    def result(self, tensor: torch.Tensor) -> Callable[[], tuple[list[float], float]]:
        if xr.device_type() == "CPU":
            # Steps run while they are handed over: there is nothing to overlap with, and a callback comes too late.
            return super().result(tensor)
        return result_when_ready(tensor)

    def barrier(self) -> None:
        if self.process_count > 1:
            torch.distributed.barrier()

    def gather_objects(self, value: Any) -> list[Any]:
        if self.process_count == 1:
            return [value]
        values = [None] * self.process_count
        torch.distributed.all_gather_object(values, value)
        return values

    def pieces(self, tensor: torch.Tensor) -> list[Piece]:
        # Until the operations that were handed over are done, their results cannot be asked for their shards.
        xm.wait_device_ops()
        shards = torch_xla._XLAC._get_local_shards([tensor])[0]
        places = torch_xla._XLAC._get_local_shard_replica_and_indices([tensor])[0]
        whole = tuple(slice(0, size) for size in tensor.shape)
        found: dict[tuple, Piece] = {}
        for (data, _), (replica, indices) in zip(shards, places, strict=True):
            index = whole if indices is Ellipsis else tuple(slice(s.start, s.stop) for s in indices)
            # Each replica but the first repeats what another device, perhaps of another host, has saved.
            if replica == 0:
                found[tuple((s.start, s.stop) for s in index)] = (index, data)
        return list(found.values())

    def compilations(self) -> int:
        data = met.metric_data("CompileTime")
        return data[0] if data else 0

    def compilations_begun(self) -> int:
        # Counted when a graph is looked for and is not there.
        return met.counter_value("UncachedCompile") or 0


def _slices() -> list[int]:
    """The slice that each device is in, in the order of their numbers."""
    devices = xr.global_runtime_device_attributes()
    devices.sort(key=lambda device: int(device["name"].rpartition(":")[2]))
    return [device.get("slice_index", 0) for device in devices]


def result_when_ready(tensor: torch.Tensor) -> Callable[[], tuple[list[float], float]]:
    """`Backend.result` for devices that work while the host goes on."""
    from torch_xla.experimental.callback import on_ready_callback

    ready, at = threading.Event(), []

    def note(_: torch.Tensor) -> None:
        at.append(time.perf_counter())
        ready.set()

    on_ready_callback(tensor, note)

    def wait() -> tuple[list[float], float]:
        ready.wait()
        return tensor.tolist(), at[0]

    return wait
