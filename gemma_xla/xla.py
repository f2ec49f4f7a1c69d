"""The seam: the only module that imports torch_xla. A move to its successor touches this file alone.

One process drives all the devices of its host (SPMD): tensors look whole, and the compiler splits the work as their
sharding says (GSPMD, arXiv:2105.04663).
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from gemma_xla.backend import Backend, Piece, narrower, part_of
from gemma_xla.config import MeshSection
from gemma_xla.errors import UserError
from gemma_xla.model.attention import Mask
from gemma_xla.sharding import AXES, MeshShape, Spec, resolve_mesh

# The most elements of a tensor that a host makes wider by itself.
WIDE = 2**27


def configure_environment(virtual_devices: int | None) -> None:
    """Prepare the environment that torch_xla reads when it is first used; call this before it is imported."""
    # Errors only: the compiler warns of its own deprecations once for every graph. 1 is what torch_xla sets by itself,
    # and a launcher that has imported it hands that down.
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL") in (None, "1"):
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    if virtual_devices is None:
        return
    os.environ["PJRT_DEVICE"] = "CPU"
    os.environ["CPU_NUM_DEVICES"] = str(virtual_devices)


def open_backend(section: MeshSection, *, use_xla: bool, device: torch.device | None = None) -> Backend:
    """Return the backend of this machine.

    Args:
        section: the config's ``mesh``.
        use_xla: whether to run through PyTorch/XLA.
        device: the device of a run without it; None: that which accelerate chooses for this process.

    Raises:
        UserError: the mesh does not fit the devices.
    """
    if use_xla:
        return XlaBackend(section)
    # It loads accelerate, which takes seconds.
    from gemma_xla.distributed import open_torch

    return open_torch(section, device)


class XlaBackend(Backend):
    """All devices of a TPU slice, or several simulated on a CPU, as one mesh."""

    name = "xla"
    attention = "reference"

    def __init__(self, section: MeshSection) -> None:
        configure_environment(section.virtual_devices)
        global torch_xla, xm, xr, xs, met
        import torch_xla
        import torch_xla.core.xla_model as xm
        import torch_xla.debug.metrics as met
        import torch_xla.distributed.spmd as xs
        import torch_xla.runtime as xr

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
        self.device = torch_xla.device()
        self.mesh: MeshShape = resolve_mesh(section, num_devices)
        self.batch_shards = self.mesh.batch_shards
        shape = tuple(getattr(self.mesh, axis) for axis in AXES)
        self._mesh = xs.Mesh(np.arange(num_devices), shape, AXES)
        xs.set_global_mesh(self._mesh)
        self.process_index = xr.process_index()
        self.process_count = xr.process_count()
        if self.process_count > 1:
            if self.mesh.tensor > 1:
                # A host's rows are dealt out to all of its devices, whatever their place on the tensor axis.
                raise UserError(f"mesh.tensor is {self.mesh.tensor}; with several hosts it must be 1")
            import torch_xla.distributed.xla_backend  # noqa: F401 (registers the address "xla://")

            torch.distributed.init_process_group("gloo", init_method="xla://")

    @property
    def device_kind(self) -> str:
        kind = xr.device_type()
        if kind != "TPU":
            return kind.lower()
        return torch_xla.tpu.get_tpu_env()["ACCELERATOR_TYPE"]

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.float32 if xr.device_type() == "CPU" else torch.bfloat16

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
        return _Constrain.apply(tensor, repr(forward), repr(backward))

    def remat(self, function: Callable[..., torch.Tensor], *args, draws: bool = False) -> torch.Tensor:
        from torch_xla.utils.checkpoint import checkpoint

        return checkpoint(function, *args, preserve_rng_state=draws)

    def scan_layers(self, layers: nn.ModuleList, h: torch.Tensor, cos, sin, segment_ids, remat: bool) -> torch.Tensor:
        return _scan_layers(layers, h, cos, sin, segment_ids, remat)

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


@torch.library.custom_op("gemma_xla::constrain", mutates_args=())
def _constrain(tensor: torch.Tensor, spec: str) -> torch.Tensor:
    """A copy of ``tensor`` split as ``spec`` (the repr of a spec) says; an operator so that a scan can trace it."""
    import ast

    # `clone` would keep an annotation the tensor already has, which cannot be replaced.
    copy = tensor * 1
    torch_xla._XLAC._xla_mark_sharding(copy, xs.get_global_mesh().get_op_sharding(ast.literal_eval(spec)))
    return copy


@_constrain.register_fake
def _(tensor: torch.Tensor, spec: str) -> torch.Tensor:
    return torch.empty_like(tensor)


class _Constrain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, forward, backward):
        ctx.backward_spec = backward
        return _constrain(tensor, forward)

    @staticmethod
    def backward(ctx, grad):
        return _constrain(grad, ctx.backward_spec), None, None


def _scan_layers(layers: nn.ModuleList, h, cos, sin, segment_ids, remat: bool) -> torch.Tensor:
    """One traced layer inside XLA's `While`, fed with the stacked parameters of all layers."""
    import torch._functorch.config as functorch_config
    import torch_xla.experimental.scan as scan_module
    from functorch.compile import default_partition, min_cut_rematerialization_partition

    # It would import jax and flax only to give gradients the sharding of parameters, which `constrain` already does.
    scan_module.shard_as = lambda a, b: (a, b)
    template = layers[0]
    names = [name for name, _ in template.named_parameters()]
    per_layer = [dict(layer.named_parameters()) for layer in layers]
    stacked = tuple(torch.stack([parameters[name] for parameters in per_layer]) for name in names)

    def one_layer(carry, weights):
        h, cos, sin, *segments = carry
        args = (h, cos, sin, Mask(*segments))
        h = torch.func.functional_call(template, dict(zip(names, weights, strict=True)), args)
        return (h, cos.clone(), sin.clone(), *(s.clone() for s in segments)), None

    # What is carried must be able to have a gradient; a float32 holds every segment id exactly.
    segments = () if segment_ids is None else (segment_ids.float(),)
    partition = min_cut_rematerialization_partition if remat else default_partition
    # A budget of zero: nothing but the layer's inputs is kept for the backward pass.
    with functorch_config.patch(activation_memory_budget=0.0 if remat else 1.0):
        (h, *_), _ = scan_module.scan(one_layer, (h, cos, sin, *segments), stacked, partition_fn=partition)
    return h
