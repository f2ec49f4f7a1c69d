"""What the model needs of the compiler: tensors split as told, and layers in a loop that is compiled once."""

from __future__ import annotations

import ast

import torch
import torch_xla
import torch_xla.distributed.spmd as xs
from torch import nn

from gemma_xla.model.attention import Mask


@torch.library.custom_op("gemma_xla::constrain", mutates_args=())
def _constrain(tensor: torch.Tensor, spec: str) -> torch.Tensor:
    """A copy of ``tensor`` split as ``spec`` (the repr of a spec) says; an operator so that a scan can trace it."""
    # `clone` would keep an annotation the tensor already has, which cannot be replaced.
    copy = tensor * 1
    torch_xla._XLAC._xla_mark_sharding(copy, xs.get_global_mesh().get_op_sharding(ast.literal_eval(spec)))
    return copy


@_constrain.register_fake
def _(tensor: torch.Tensor, spec: str) -> torch.Tensor:
    return torch.empty_like(tensor)


class Constrain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, forward, backward):
        ctx.backward_spec = backward
        return _constrain(tensor, forward)

    @staticmethod
    def backward(ctx, grad):
        return _constrain(grad, ctx.backward_spec), None, None


def scan_layers(layers: nn.ModuleList, h, cos, sin, segment_ids, remat: bool) -> torch.Tensor:
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
