"""What the model needs of the compiler: tensors split as told, and layers in a loop that is compiled once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torch_xla
import torch_xla.debug.profiler as xp
import torch_xla.distributed.spmd as xs
from torch import nn
from torch_xla.experimental.scan import _scan_impl_flat

from gemma_xla.model.attention import Mask
from gemma_xla.model.kept import Kept, Noting, Replaying, using
from gemma_xla.model.loss import Layout
from gemma_xla.sharding import BATCH, MeshShape, Spec
from gemma_xla.xla.tpu import in_rows
from gemma_xla.xla.unfilled import Unfilled


def _constrain(tensor: torch.Tensor, spec: Spec) -> torch.Tensor:
    """A copy of ``tensor`` split as ``spec`` says."""
    # `clone` would keep an annotation the tensor already has, which cannot be replaced.
    copy = tensor * 1
    torch_xla._XLAC._xla_mark_sharding(copy, xs.get_global_mesh().get_op_sharding(spec))
    return copy


class Constrain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, forward, backward):
        ctx.backward_spec = backward
        return _constrain(tensor, forward)

    @staticmethod
    def backward(ctx, grad):
        return _constrain(grad, ctx.backward_spec), None, None


class MeshLayout(Layout):
    """The loss of a batch whose rows are split over a mesh: a loop that is compiled once."""

    def __init__(self, mesh: MeshShape) -> None:
        super().__init__(mesh.batch_shards)

    def apart(self, x_P):
        return x_P if self.parts == 1 else _constrain(x_P, (BATCH, *(None for _ in x_P.shape[1:])))

    def fold(self, step, carry, chunks):
        if len(chunks) == 1:
            return super().fold(step, carry, chunks)
        # What is left over is one more chunk, of a size of its own.
        whole = [chunk for chunk in chunks if chunk[0].shape == chunks[0][0].shape]

        def body(carry, inputs):
            with xp.Trace("loss"):
                carry, result = step(carry, inputs)
            return carry, [result]

        carry, (results,) = _scan_impl_flat(body, carry, [torch.stack(inputs) for inputs in zip(*whole, strict=True)])
        carry, rest = super().fold(step, list(carry), chunks[len(whole) :])
        return carry, [*results.unbind(), *rest]


def fenced(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that the compiler may not compute together with what uses it."""
    copy = tensor * 1
    torch_xla._XLAC._xla_optimization_barrier_([copy])
    return copy


class Fence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return tensor * 1

    @staticmethod
    def backward(ctx, grad):
        return fenced(grad)


class GatedGelu(torch.autograd.Function):
    """``gelu(gate) * up``, whose gradient's factors are found where ``up`` is.

    There a matrix product hides them. Left to itself, the compiler finds them where the gradient arrives, in a pass of
    its own where ``gate`` is kept, and again in each product that takes the gradient where it is not.
    """

    @staticmethod
    def forward(ctx, gate, up, apart: bool):
        ctx.save_for_backward(gate, up)
        out = F.gelu(gate, approximate="tanh") * up
        return fenced(out) if apart else out

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        x = gate.float()
        tanh = torch.tanh(_TANH_SCALE * (x + _CUBIC * x * x * x))
        inner = _TANH_SCALE * (1 + 3 * _CUBIC * x * x)
        slope = 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * inner
        by_gate = fenced((slope * up.float()).to(gate.dtype))
        by_up = (0.5 * x * (1 + tanh)).to(gate.dtype)
        return grad * by_gate, grad * by_up, None


# Of gelu's tanh form (arXiv:1606.08415).
_TANH_SCALE, _CUBIC = math.sqrt(2 / math.pi), 0.044715
# A sine of all positions of a row at once is a third of a million instructions, and half a minute of compilation.
_POSITIONS = 512


def by_positions(
    function: Callable[..., tuple[torch.Tensor, ...]], position_ids_BT: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Return ``function(position_ids_BT)``, tensors ``[B, T, ...]``, found in a loop over parts of T."""
    if position_ids_BT.shape[1] % _POSITIONS or position_ids_BT.shape[1] == _POSITIONS:
        return function(position_ids_BT)

    def body(carry, inputs):
        return [carry[0] * 1], list(function(*inputs))

    parts = torch.stack(position_ids_BT.split(_POSITIONS, dim=1))
    _, tables = _scan_impl_flat(body, [position_ids_BT[0, 0]], [parts])
    return tuple(table.transpose(0, 1).flatten(1, 2) for table in tables)


def scan_layers(
    layers: nn.ModuleList, h_BTD: torch.Tensor, cos, sin, segment_ids_BT, kept: dict[str, int], draws: bool = False
) -> torch.Tensor:
    """Apply equal layers in XLA loops, each compiled once and fed with the stacked parameters of its layers.

    Args:
        layers: the first one stands for all.
        h_BTD: what goes into the first layer.
        kept: activations that the backward pass need not compute again (`gemma_xla.model.config.ACTIVATIONS`), and in
            how many of the first layers. Layers that keep the same are one loop.
        draws: layers use random numbers.
    """
    constants = [x for x in (cos, sin, segment_ids_BT) if x is not None]
    mesh = MeshShape(*xs.get_global_mesh().mesh_shape)
    names = [name for name, _ in layers[0].named_parameters()]
    per_layer = [dict(layer.named_parameters()) for layer in layers]
    ends = sorted({min(count, len(layers)) for count in kept.values()} | {len(layers)})
    for start, end in zip([0, *ends], ends, strict=False):
        stacked = [torch.stack([parameters[name] for parameters in per_layer[start:end]]) for name in names]
        keeps = frozenset(name for name, count in kept.items() if count > start)
        loop = _Loop(layers[0], names, keeps, len(constants), torch.is_grad_enabled(), mesh, draws)
        h_BTD = _Layers.apply(loop, h_BTD, *constants, *stacked)
    return h_BTD


@dataclass
class _Loop:
    layer: nn.Module
    names: list[str]
    kept: frozenset[str]
    num_constants: int
    has_backward: bool
    mesh: MeshShape
    draws: bool

    def turns(self, like: torch.Tensor) -> list[torch.Tensor]:
        """What makes random numbers differ from layer to layer: with several devices a loop draws the same in each."""
        return [torch.rand(like.shape[0], device=like.device)] if self.draws else []

    def split(self, tensors):
        return tensors[: self.num_constants], tensors[self.num_constants :]

    def laid_out(self, name: str, kept: torch.Tensor) -> torch.Tensor:
        """An activation as the backward loop wants it: otherwise each turn of that lays it out anew."""
        # What a kernel gives lies like that. Along the tensor axis activations are split in many ways.
        return in_rows(kept, self.mesh) if name.endswith("_proj") and self.mesh.tensor == 1 else kept

    def run(self, h, constants, weights, kept: Kept) -> torch.Tensor:
        cos, sin, *segments = constants
        weights = dict(zip(self.names, weights, strict=True))
        with using(kept):
            return torch.func.functional_call(self.layer, weights, (h, cos, sin, Mask(*segments)))


class _Layers(torch.autograd.Function):
    """Layers whose backward pass is a loop too: it runs each layer again, but for what was kept of it."""

    @staticmethod
    def forward(ctx, loop: _Loop, h, *tensors):
        constants, stacked = loop.split(tensors)
        noted: list[Noting] = []

        def body(carry, x):
            h, *constants = carry
            turn, weights = x[: loop.draws], x[loop.draws :]
            noted.append(Noting(loop.kept, *turn))
            with xp.Trace("layer"):
                out = loop.run(h, constants, weights, noted[-1])
            if not loop.has_backward:
                return [out, *constants], []
            values = [loop.laid_out(name, value) for name in noted[-1].values for value in noted[-1].values[name]]
            # As the backward loop wants it: otherwise the inputs of all layers are laid out anew between the loops.
            return [in_rows(out, loop.mesh), *constants], [h * 1, *values]

        with Unfilled() as buffers:
            per_layer = [*loop.turns(stacked[0]), *stacked]
            (h, *_), kept = _scan_impl_flat(buffers.outside(body), [h, *constants], per_layer)
        ctx.loop, ctx.kept = loop, {name: len(values) for name, values in noted[-1].values.items()}
        ctx.save_for_backward(*constants, *stacked, *kept)
        return h

    @staticmethod
    def backward(ctx, grad):
        loop = ctx.loop
        constants, rest = loop.split(ctx.saved_tensors)
        stacked, (inputs, *kept) = rest[: len(loop.names)], rest[len(loop.names) :]
        trained = [i for i, needed in enumerate(ctx.needs_input_grad[2 + loop.num_constants :]) if needed]

        def body(carry, x):
            grad, *constants = carry
            turn, (h, *rest) = x[: loop.draws], x[loop.draws :]
            values, weights = iter(rest[: len(kept)]), [weight.detach() for weight in rest[len(kept) :]]
            given = {name: [next(values) for _ in range(count)] for name, count in ctx.kept.items()}
            h = h.detach().requires_grad_()
            for i in trained:
                weights[i].requires_grad_()
            noted = Replaying(given, *turn)
            # Gradients too may be rounded at random.
            with torch.enable_grad(), using(noted), xp.Trace("layer_backward"):
                out = loop.run(h, constants, weights, noted)
                grad_h, *grads = torch.autograd.grad(out, [h, *(weights[i] for i in trained)], grad)
            return [grad_h, *constants], grads

        with torch.no_grad():
            per_layer = [*loop.turns(inputs), inputs, *kept, *stacked]
            (grad, *_), grads = _scan_impl_flat(body, [grad, *constants], per_layer, reverse=True)
        by_weight = dict(zip(trained, grads, strict=True))
        return None, grad, *(None for _ in constants), *(by_weight.get(i) for i in range(len(stacked)))
