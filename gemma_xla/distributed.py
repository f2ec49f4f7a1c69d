"""Plain PyTorch in several processes, one per GPU or several on a CPU, started by `accelerate launch` or `torchrun`.

The ``data`` axis repeats the model; gradients are added up once per step. The ``fsdp`` axis splits parameters and
optimizer state (FSDP2: ZeRO stage 3, arXiv:1910.02054, arXiv:2304.11277): such a parameter is a `DTensor`, which holds
this process's part.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, init_device_mesh

from gemma_xla.backend import Backend, Piece, fill, part_of, sum_of_squares
from gemma_xla.config import MeshSection
from gemma_xla.errors import UserError
from gemma_xla.sharding import MeshShape, Spec, resolve_mesh

# Small gradients are added up together, so many elements at a time.
BUCKET = 2**24


def open_torch(section: MeshSection, device: torch.device | None) -> Backend:
    """Return the backend of this process, connected to the others if several were started.

    Args:
        section: the config's ``mesh``.
        device: where a process that is alone runs; None: where accelerate says.

    Raises:
        UserError: the mesh does not fit the processes.
    """
    if device is None:
        # By itself accelerate connects processes over GPUs only.
        only_cpu = "LOCAL_RANK" in os.environ and not torch.cuda.is_available()
        state = PartialState(cpu=only_cpu or parse_flag_from_env("ACCELERATE_USE_CPU"))
        if state.num_processes > 1:
            return ProcessBackend(section, state.device)
        device = state.device
    # One device does the work of all that are simulated; to ask for more devices than those is a mistake here too.
    return Backend(device, resolve_mesh(section, section.virtual_devices or 1).batch_shards)


class ProcessBackend(Backend):
    """One device per process: each computes its own rows of a batch."""

    def __init__(self, section: MeshSection, device: torch.device) -> None:
        """
        Args:
            section: the config's ``mesh``.
            device: that of this process, which is connected to the others.

        Raises:
            UserError: the mesh does not fit the processes.
        """
        self.process_index, self.process_count = dist.get_rank(), dist.get_world_size()
        mesh = process_mesh(section, self.process_count)
        super().__init__(torch.device("cpu") if device.type == "cpu" else device, mesh.batch_shards)
        self.mesh = mesh
        # What processes tell each other at every step must not wait for their GPUs.
        self._talk = dist.new_group(backend="gloo")
        self._split = self._repeated = None
        if mesh.fsdp > 1:
            axes = ("data", "fsdp") if mesh.data > 1 else ("fsdp",)
            devices = init_device_mesh(
                self.device.type, tuple(getattr(mesh, axis) for axis in axes), mesh_dim_names=axes
            )
            self._split, self._repeated = devices["fsdp"], devices["data"] if mesh.data > 1 else None

    def place(self, tensor: torch.Tensor, spec: Spec) -> torch.Tensor:
        part = tensor[self._index(tensor.shape, spec)]
        return self._as_part(torch.empty_like(part, device=self.device).copy_(part), tensor.shape, spec)

    def place_from(self, shape, spec, copy_to, dtype=torch.float32, out=torch.float32) -> torch.Tensor:
        index = self._index(shape, spec)
        local = torch.empty([at.stop - at.start for at in index], dtype=out, device=self.device)
        fill(local, copy_to, dtype, index)
        return self._as_part(local, shape, spec)

    def gather_units(self, units: list[nn.Module], dtype: torch.dtype, reduce_dtype: torch.dtype) -> None:
        if self._split is None:
            return
        root = units[-1]
        held = {name: p for name, p in root.named_parameters() if isinstance(p, DTensor)}
        whole = {p for p in root.parameters() if not isinstance(p, DTensor)}
        # FSDP would split whole tensors by itself. It is shown tensors without values, and finds ours when the model
        # runs: the optimizer has them already, and none was ever whole.
        shown = {name: nn.Parameter(_without_values(p), requires_grad=p.requires_grad) for name, p in held.items()}
        where = {shown[name]: p.placements[0] for name, p in held.items()}
        _set_parameters(root, shown)
        for unit in units:
            fully_shard(
                unit,
                mesh=self._split,
                shard_placement_fn=where.get,
                # Cast before gathering: half the bytes travel.
                mp_policy=MixedPrecisionPolicy(dtype, reduce_dtype, cast_forward_inputs=False),
                ignored_params=whole,
            )
            # The step divides, by the number of tokens; and not every kind of connection can.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
        _set_parameters(root, held)
        # It leaves the root's parameters whole until the backward pass, which does not come in an evaluation.
        root.register_forward_hook(lambda module, _args, _out: None if torch.is_grad_enabled() else module.reshard())

    @torch.no_grad()
    def sum_gradients(self, model: nn.Module) -> tuple[list[torch.Tensor], torch.Tensor]:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        whole = [g for g in gradients if not isinstance(g, DTensor)]
        # FSDP has added these up along its axis.
        parts = [g.to_local() for g in gradients if isinstance(g, DTensor)]
        _add_up(whole)
        squares = sum_of_squares(whole, self.device)
        if parts:
            if self._repeated is not None:
                _add_up(parts, self._repeated.get_group())
            rest = sum_of_squares(parts, self.device)
            dist.all_reduce(rest, group=self._split.get_group())
            squares = squares + rest
        return whole + parts, squares

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        return tensor

    def seed(self, seed: int) -> None:
        # Other rows, other numbers.
        super().seed(seed + self.process_index)

    def rng_state(self) -> dict[str, Any]:
        """As `Backend.rng_state`, and that of each process. All of them must call it."""
        states = self.gather_objects(super().rng_state())
        return {**states[0], "processes": states}

    def set_rng_state(self, state: dict[str, Any]) -> None:
        """Continue where this process was; one that was not there when the state was saved begins anew."""
        states = state.get("processes", [state])
        if self.process_index < len(states):
            super().set_rng_state(states[self.process_index])

    def barrier(self) -> None:
        dist.barrier(self._talk)

    def gather_objects(self, value: Any) -> list[Any]:
        values = [None] * self.process_count
        dist.all_gather_object(values, value, self._talk)
        return values

    def pieces(self, tensor: torch.Tensor) -> list[Piece]:
        if not isinstance(tensor, DTensor):
            return super().pieces(tensor) if self.process_index == 0 else []
        if self._repeated is not None and self._repeated.get_local_rank() > 0:
            return []
        spec = tuple("fsdp" if tensor.placements[0].is_shard(dim) else None for dim in range(tensor.dim()))
        return [(self._index(tensor.shape, spec), tensor.detach().to_local().to("cpu", copy=True))]

    def _index(self, shape: tuple[int, ...], spec: Spec) -> tuple[slice, ...]:
        return part_of(shape, spec, self.mesh, self.process_index)

    def _as_part(self, local: torch.Tensor, shape: tuple[int, ...], spec: Spec) -> torch.Tensor:
        """The tensor of ``shape`` of which ``local`` is this process's part."""
        split = [dim for dim, entry in enumerate(spec) if entry is not None and "fsdp" in entry]
        if self._split is None or not split:
            return local
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, self._split, [Shard(split[0])], run_check=False, shape=shape, stride=stride)


def process_mesh(section: MeshSection, processes: int) -> MeshShape:
    """The mesh of so many processes.

    Raises:
        UserError: it does not fit them.
    """
    if section.tensor != 1:
        raise UserError(
            f"mesh.tensor is {section.tensor}; that axis needs PyTorch/XLA. Set it to 1, and mesh.fsdp to the number "
            "of processes that share one copy of the parameters"
        )
    if section.virtual_devices not in (None, processes):
        raise UserError(
            f"mesh.virtual_devices is {section.virtual_devices} but {processes} processes were started, with a device "
            "each; leave it out, or start one process"
        )
    return resolve_mesh(section, processes)


def _without_values(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _set_parameters(model: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, parameter)


def _add_up(tensors: list[torch.Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Replace each tensor by its sum over the processes of a group (None: all)."""
    for bucket in _buckets(tensors):
        if len(bucket) == 1:
            dist.all_reduce(bucket[0], group=group)
            continue
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        dist.all_reduce(flat, group=group)
        for tensor, values in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(values.view_as(tensor))


def _buckets(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Lists of tensors with at most `BUCKET` elements together, unless one alone has more."""
    bucket, size = [], 0
    for tensor in tensors:
        if bucket and size + tensor.numel() > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket
