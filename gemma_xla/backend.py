"""Where a run happens. `Backend` is plain PyTorch on one device; `gemma_xla.distributed.ProcessBackend` is several of
them; `gemma_xla.xla.XlaBackend` is many devices through PyTorch/XLA. The trainer talks to each through the same few
methods.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

from gemma_xla.model.layers import GemmaAttention
from gemma_xla.model.linear import Dims, int8_dot
from gemma_xla.model.loss import Layout
from gemma_xla.sharding import AXES, MeshShape, Spec

# A part of a tensor: where it lies in the whole, and its values on the CPU.
Piece = tuple[tuple[slice, ...], torch.Tensor]
# Fills a CPU tensor, of any floating dtype, with the part of a tensor that the slices select.
CopyTo = Callable[[torch.Tensor, tuple[slice, ...]], None]
# What is on its way to another device at once, in elements.
STAGED = 2**24


class Backend:
    """Plain PyTorch on one device: nothing is split, nothing is compiled."""

    name = "torch"
    process_index = 0
    process_count = 1
    loss_layout = Layout()

    def __init__(self, device: torch.device, batch_shards: int = 1) -> None:
        """
        Args:
            device: where tensors live.
            batch_shards: the devices that a config's ``batch_size_per_device`` counts.
        """
        self.device = device
        self.mesh = MeshShape()
        self.batch_shards = batch_shards
        self.compiles = False

    @property
    def device_kind(self) -> str:
        """What the device calls itself, such as "NVIDIA H100 80GB HBM3", or "cpu"."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    def attention(self, head_dim: int, seq_len: int) -> str:
        """The best of `gemma_xla.model.attention.IMPLEMENTATIONS` for rows of so many positions."""
        return "flex" if self.device.type == "cuda" else "sdpa"

    @property
    def compute_dtype(self) -> torch.dtype:
        """The precision that suits the device."""
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16

    def place(self, tensor: torch.Tensor, spec: Spec) -> torch.Tensor:
        """Move a whole CPU tensor to the devices, split as ``spec`` says. The result shares no memory with it."""
        return tensor.to(self.device, copy=True)

    def place_from(
        self,
        shape: tuple[int, ...],
        spec: Spec,
        copy_to: CopyTo,
        dtype: torch.dtype = torch.float32,
        out: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """Return a tensor on the devices, split as ``spec`` says, that is never whole on the host beside it.

        Args:
            shape: that of the whole tensor, of at least one dimension.
            spec: how it is split.
            copy_to: called for each part that this host needs.
            dtype: the type in which the values come: what need not be wider on its way is not.
            out: the type in which they are kept.
        """
        placed = torch.empty(shape, dtype=out, device=self.device)
        fill(placed, copy_to, dtype, tuple(slice(0, size) for size in shape))
        return placed

    def place_batch(self, batch: dict[str, torch.Tensor], spec: Spec) -> dict[str, torch.Tensor]:
        """Move this host's rows of a batch to the devices."""
        return {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}

    def zeros_like(self, tensor: torch.Tensor, spec: Spec) -> torch.Tensor:
        """Zeros split like ``tensor``."""
        return torch.zeros_like(tensor)

    def constrain(self, tensor: torch.Tensor, forward: Spec, backward: Spec) -> torch.Tensor:
        """Fix how a tensor is split, and how its gradient is."""
        return tensor

    def fence_gradient(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return ``tensor``; a compiler may not join what makes its gradient with what uses that."""
        return tensor

    def made_once(self, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Return ``tensors``; a compiler may not make them anew in each place that uses them."""
        return tensors

    def suit_attention(self, attention: GemmaAttention) -> None:
        """Change how a layer's attention runs; nothing of the results changes."""

    def gated_gelu(self, gate: torch.Tensor, up: torch.Tensor, outputs: int) -> torch.Tensor:
        """Return ``gelu(gate) * up``, with gelu in its tanh form, for a product that makes so many outputs of it."""
        return F.gelu(gate, approximate="tanh") * up

    def int8_dot(self, left: torch.Tensor, right: torch.Tensor, dims: Dims) -> torch.Tensor:
        """Multiply int8 tensors, summing in int32 (`gemma_xla.model.linear.int8_dot`)."""
        return int8_dot(left, right, dims)

    def laid_out(self, matrix: torch.Tensor, spec: Spec, *, turned: bool = False) -> torch.Tensor | None:
        """Return an int8 matrix, or its transpose, as a product that sums over its last dimension needs it in memory.

        It is split as the matrix is (``spec``). None where the matrix, or a view of it, does as well.
        """

    def remat(self, function: Callable[..., torch.Tensor], *args, draws: bool = False) -> torch.Tensor:
        """Call ``function``, keeping only its inputs for the backward pass; ``draws``: it uses random numbers."""
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)

    def by_positions(
        self, function: Callable[..., tuple[torch.Tensor, ...]], position_ids_BT: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Return ``function(position_ids_BT)``, tensors ``[B, T, ...]``; where it helps, in a loop over parts of T."""
        return function(position_ids_BT)

    def scan_layers(
        self, layers: nn.ModuleList, h, cos, sin, segment_ids, kept: dict[str, int], draws=False
    ) -> torch.Tensor:
        """Apply equal layers in loops that are compiled once.

        Args:
            kept: names of `gemma_xla.model.config.ACTIVATIONS`, and in how many of the first layers each is kept for
                the backward pass; the rest is computed again.
            draws: the layers use random numbers.
        """
        raise NotImplementedError("scan_layers needs PyTorch/XLA")

    def use_compiler(self, wanted: bool | None) -> None:
        """Decide whether `compile` compiles; None: where that is worth its time, on a GPU."""
        self.compiles = self.device.type == "cuda" if wanted is None else wanted
        self.loss_layout = CompiledLayout(self.compile) if self.compiles else Layout()

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that does the same, compiled for each shape of its arguments."""
        return torch.compile(function, dynamic=False) if self.compiles else function

    def optimizer_options(self) -> dict[str, bool]:
        """Arguments with which torch.optim works best here."""
        return {"fused": True} if self.device.type == "cuda" else {}

    def scalar(self, value: float) -> float | torch.Tensor:
        """A number that changes from step to step, in the form that needs no new compilation."""
        return value

    def seed(self, seed: int) -> None:
        """Start the random generators anew."""
        torch.manual_seed(seed)

    def rng_state(self) -> dict[str, Any]:
        """Where the random generators are, for JSON."""
        states = {"torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return {kind: base64.b64encode(state.numpy().tobytes()).decode() for kind, state in states.items()}

    def set_rng_state(self, state: dict[str, Any]) -> None:
        """Put the random generators where `rng_state` found them; those of another kind of device begin anew."""
        states = {kind: value for kind, value in state.items() if kind in ("torch", "cuda")}
        decoded = {k: torch.frombuffer(bytearray(base64.b64decode(v)), dtype=torch.uint8) for k, v in states.items()}
        torch.set_rng_state(decoded["torch"])
        if self.device.type == "cuda" and "cuda" in decoded:
            torch.cuda.set_rng_state(decoded["cuda"], self.device)

    def flush(self) -> None:
        """Hand the recorded operations to the device; without effect where they run at once."""

    def result(self, tensor: torch.Tensor) -> Callable[[], tuple[list[float], float]]:
        """Return a function that waits for a step's figures, ``[n]``, and tells when the device had them.

        The time is `time.perf_counter`'s. Between the two calls the device may work on, and be given more to do.
        """
        if self.device.type != "cuda":
            done = tensor.tolist(), time.perf_counter()
            return lambda: done
        # A plain read would wait for whatever was queued since.
        values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
        event = torch.cuda.Event()
        event.record()

        def wait() -> tuple[list[float], float]:
            event.synchronize()
            return values.tolist(), time.perf_counter()

        return wait

    def gather_units(self, units: list[nn.Module], dtype: torch.dtype, reduce_dtype: torch.dtype) -> None:
        """Have parameters that are split gathered, in ``dtype``, while a unit runs; a compiler does that by itself.

        Args:
            units: modules; the last one holds the others.
            dtype: the compute dtype.
            reduce_dtype: in which their gradients are added up.
        """

    def sum_gradients(self, model: nn.Module) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return the gradients of all processes' rows, of each what this process holds, and the sum of all squares."""
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return gradients, sum_of_squares(gradients, self.device)

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all processes, where each has computed its own rows' part of it."""
        return tensor

    def barrier(self) -> None:
        """Wait until every host has come here."""

    def gather_objects(self, value: Any) -> list[Any]:
        """Return every host's ``value``, in the order of hosts."""
        return [value]

    def pieces(self, tensor: torch.Tensor) -> list[Piece]:
        """The parts of a tensor that this host must save, on the CPU; parts held twice are listed once."""
        return [(tuple(slice(0, size) for size in tensor.shape), tensor.detach().to("cpu", copy=True))]

    def compilations(self) -> int:
        """Graphs compiled so far by this process."""
        return torch._dynamo.utils.counters["stats"]["unique_graphs"] if self.compiles else 0

    def compilations_begun(self) -> int:
        """A number that grows when a compilation begins; any thread may ask."""
        return torch._dynamo.utils.counters["frames"]["total"] if self.compiles else 0


class CompiledLayout(Layout):
    """The loss on one device, what is done with each chunk compiled."""

    def __init__(self, compile: Callable[..., Any]) -> None:
        super().__init__()
        self._compile = compile

    def fold(self, step, carry, chunks):
        return super().fold(self._compile(step), carry, chunks)


def sum_of_squares(tensors: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """The square of the norm of all tensors together, a float32 scalar."""
    # Not torch's own norm: on the CPU that loses four digits over a million entries (float32, one sum).
    squares = [tensor.pow(2).sum() for tensor in tensors]
    return torch.stack(squares).sum() if squares else torch.zeros((), device=device)


def narrower(dtype: torch.dtype, out: torch.dtype) -> torch.dtype:
    """The type that carries values of ``dtype`` to a tensor of type ``out`` in the fewest bytes."""
    return dtype if dtype.itemsize < out.itemsize else out


def fill(out: torch.Tensor, copy_to: CopyTo, dtype: torch.dtype, index: tuple[slice, ...]) -> None:
    """Fill a tensor on any device with the part at ``index`` of one whose values come as ``dtype``."""
    if out.device.type == "cpu":
        copy_to(out, index)
    elif out.numel():
        fill_in_rows(out, copy_to, narrower(dtype, out.dtype), index)


def fill_in_rows(out: torch.Tensor, copy_to: CopyTo, dtype: torch.dtype, index: tuple[slice, ...]) -> None:
    """`fill` with values that travel as ``dtype``, some rows at a time."""
    rows = max(1, STAGED // out[0].numel())
    for start in range(0, len(out), rows):
        part = out[start : start + rows]
        staged = torch.empty(part.shape, dtype=dtype)
        first = index[0].start + start
        copy_to(staged, (slice(first, first + len(part)), *index[1:]))
        part.copy_(staged)


def part_of(shape: tuple[int, ...], spec: Spec, mesh: MeshShape, device: int) -> tuple[slice, ...]:
    """The part of a tensor that a device holds; devices are numbered along the mesh, its last axis first."""
    at = {}
    for axis in reversed(AXES):
        device, at[axis] = divmod(device, getattr(mesh, axis))
    part = []
    for size, entry in zip(shape, spec, strict=True):
        count, number = 1, 0
        # The first axis of several counts the larger steps.
        for axis in (entry,) if isinstance(entry, str) else entry or ():
            ways = getattr(mesh, axis)
            count, number = count * ways, number * ways + at[axis]
        part.append(slice(size * number // count, size * (number + 1) // count))
    return tuple(part)
