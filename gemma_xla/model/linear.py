"""Linear layers whose matrix products are made of 8-bit integers, or whose gradients are added up in float32.

A TPU multiplies 8-bit integers at twice the speed of bfloat16. Nothing is stored in 8 bits: at each use the weight is
scaled per output channel, activations and gradients per row (per channel where rows are summed over), by the largest
magnitude; rounded to integers from -127 to 127; multiplied and summed exactly in 32 bits; and scaled back. Parameters,
optimizer, norms, embedding, output layer and attention keep their precision. The idea is that of AQT
(https://github.com/google/aqt).

Shape letters: B batch rows, T positions, I and O a layer's inputs and outputs, P parts of the batch on devices of their
own, K what is summed over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from gemma_xla.model.kept import kept
from gemma_xla.model.loss import Layout

LARGEST = 127
# More products of two such integers could exceed 32 bits.
MOST_SUMMED = (2**31 - 1) // LARGEST**2
# As many add up exactly in float32.
_EXACT = 2**24 // LARGEST**2
# What `torch._int_mm` takes on a GPU: so many rows at least, and multiples of eight.
_FEWEST, _EIGHT = 17, 8

# Dimensions summed over and dimensions of the batch, of the left and of the right argument.
Dims = tuple[tuple[list[int], list[int]], tuple[list[int], list[int]]]


@dataclass(frozen=True)
class Products:
    """How a layer's products are computed.

    Attributes:
        in_8_bits: those that are, of `gemma_xla.model.config.INT8_PRODUCTS`; the others keep the inputs' precision.
        stochastic: gradients are rounded up or down at random, right on average.
        dot: multiplies int8 tensors; int32.
        gather: makes a weight, or what has its first dimension, whole on every device that uses it.
        gather_turned: makes a weight's transpose ``[I, O]`` whole.
        scatter: says how a weight's gradient is split.
        layout: where the rows of a batch lie.
        sum_dtype: in which the devices' parts of a weight's gradient are added up; None: the inputs' precision.
    """

    in_8_bits: frozenset[str]
    stochastic: bool
    dot: Callable[[torch.Tensor, torch.Tensor, Dims], torch.Tensor]
    gather: Callable[[torch.Tensor], torch.Tensor]
    gather_turned: Callable[[torch.Tensor], torch.Tensor]
    scatter: Callable[[torch.Tensor], torch.Tensor]
    layout: Layout
    sum_dtype: torch.dtype | None = None


def quantise(
    x: torch.Tensor, dim: int | tuple[int, ...], stochastic: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return 8-bit integers and the float32 scales, of size 1 along ``dim``, that make them ``x`` again.

    A scale is the largest magnitude along ``dim`` over 127. An element is off by at most half of it, or, with
    ``stochastic``, by less than all of it.
    """
    x = x.float()
    scale = x.abs().amax(dim, keepdim=True) / LARGEST
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    x = x / scale
    x = torch.floor(x + kept().uniform(x)) if stochastic else torch.round(x)
    return x.clamp(-LARGEST, LARGEST).to(torch.int8), scale


def int8_dot(left: torch.Tensor, right: torch.Tensor, dims: Dims) -> torch.Tensor:
    """Multiply int8 tensors exactly: batch dimensions first, then what is left of each; int32."""
    left_BMK, right_BNK = (_arranged(x, *own) for x, own in zip((left, right), zip(*dims, strict=True), strict=True))
    if left.device.type == "cuda":
        result = torch.stack([_on_gpu(a, b) for a, b in zip(left_BMK, right_BNK, strict=True)])
    else:
        result = sum(
            (a.float() @ b.float().mT).to(torch.int32)
            for a, b in zip(left_BMK.split(_EXACT, -1), right_BNK.split(_EXACT, -1), strict=True)
        )
    kept = [_rest(x, *own) for x, own in zip((left, right), zip(*dims, strict=True), strict=True)]
    batch = [left.shape[i] for i in dims[1][0]]
    return result.view(*batch, *(left.shape[i] for i in kept[0]), *(right.shape[i] for i in kept[1]))


def _on_gpu(left_MK: torch.Tensor, right_NK: torch.Tensor) -> torch.Tensor:
    """``left right^T`` by `torch._int_mm`, which takes more than 16 rows, and everything else by eights.

    Both lie along K in memory: the one layout that cuBLAS has fast kernels for.
    """
    M, N = len(left_MK), len(right_NK)
    left_MK, right_NK = _padded(left_MK, _FEWEST - M), _padded(right_NK, -N % _EIGHT)
    return torch._int_mm(left_MK, right_NK.T)[:M, :N]


def _padded(x_RK: torch.Tensor, rows: int) -> torch.Tensor:
    """The matrix with so many rows of zeros more, and columns to a multiple of eight: they add nothing to any sum."""
    columns, rows = -x_RK.shape[1] % _EIGHT, max(0, rows)
    return F.pad(x_RK, (0, columns, 0, rows)) if rows or columns else x_RK.contiguous()


def _rest(x: torch.Tensor, summed: list[int], batch: list[int]) -> list[int]:
    return [i for i in range(x.dim()) if i not in summed and i not in batch]


def _arranged(x: torch.Tensor, summed: list[int], batch: list[int]) -> torch.Tensor:
    rest = _rest(x, summed, batch)
    sizes = ([x.shape[i] for i in part] for part in (batch, rest, summed))
    return x.permute(*batch, *rest, *summed).reshape(*(torch.Size(size).numel() for size in sizes))


def linear(x_BTI: torch.Tensor, weight_OI: torch.Tensor, how: Products) -> torch.Tensor:
    """``x W^T``, ``[B, T, O]`` in the precision of ``x``.

    Args:
        x_BTI: the inputs.
        weight_OI: as it is stored, in any precision.
        how: which products, and how.
    """
    return _Linear.apply(x_BTI, weight_OI, how)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BTI, weight_OI, how):
        # Sent in 8 bits, a quarter of what is stored; in the inputs' precision only where a product asks for it.
        exact = {"output", "grad_input"} - how.in_8_bits
        whole_OI = how.gather(weight_OI.to(x_BTI.dtype)) if exact else None
        part_OI = w_scale_O1 = None
        if how.in_8_bits & {"output", "grad_input"}:
            part_OI, w_scale_O1 = quantise(weight_OI, 1)
            w_scale_O1 = how.gather(w_scale_O1)
        ctx.how, ctx.dtype = how, weight_OI.dtype
        ctx.save_for_backward(x_BTI, whole_OI, part_OI, w_scale_O1)
        if "output" in exact:
            return x_BTI @ whole_OI.T
        x8_BTI, x_scale_BT1 = quantise(x_BTI, -1)
        out_BTO = how.dot(x8_BTI, how.gather(part_OI), (([2], [1]), ([], [])))
        return (out_BTO.float() * x_scale_BT1 * w_scale_O1[:, 0]).to(x_BTI.dtype)

    @staticmethod
    def backward(ctx, grad_BTO):
        x_BTI, whole_OI, part_OI, w_scale_O1 = ctx.saved_tensors
        how, grad_x = ctx.how, None
        if ctx.needs_input_grad[0] and "grad_input" in how.in_8_bits:
            # The weight's scales belong to what is summed over, so they go into the other side before it is rounded.
            g8_BTO, g_scale_BT1 = quantise(grad_BTO.float() * w_scale_O1[:, 0], -1, how.stochastic)
            grad_BTI = how.dot(g8_BTO, how.gather_turned(part_OI), (([2], [1]), ([], [])))
            grad_x = (grad_BTI.float() * g_scale_BT1).to(x_BTI.dtype)
        elif ctx.needs_input_grad[0]:
            grad_x = grad_BTO @ whole_OI
        grad_weight = _grad_weight(x_BTI, grad_BTO, how).to(ctx.dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None


def _grad_weight(x_BTI: torch.Tensor, grad_BTO: torch.Tensor, how: Products) -> torch.Tensor:
    if how.sum_dtype is None and "grad_weight" not in how.in_8_bits:
        return how.scatter(grad_BTO.flatten(0, 1).T @ x_BTI.flatten(0, 1))
    # In each part by itself: scales over rows on other devices would have to wait for these, and a product over all
    # devices' rows is added up in its own precision.
    parts, rows = how.layout.parts, x_BTI.shape[0] // how.layout.parts
    # Several rows stay apart: joined, they would have to be laid out anew.
    own = () if rows == 1 else (rows,)
    x, grad = (how.layout.apart(x.reshape(parts, *own, *x.shape[1:])) for x in (x_BTI, grad_BTO))
    summed = [*range(1, x.dim() - 1)]
    if "grad_weight" in how.in_8_bits:
        x8, x_scale = quantise(x, tuple(summed))
        g8, g_scale = quantise(grad, tuple(summed), how.stochastic)
        grad_POI = how.dot(g8, x8, ((summed, summed), ([0], [0]))).float()
        grad_POI = grad_POI * g_scale.view(parts, -1, 1) * x_scale.view(parts, 1, -1)
    else:
        grad_POI = torch.einsum("p...o,p...i->poi", grad, x)
    return how.scatter(grad_POI.to(how.sum_dtype or x_BTI.dtype).sum(0))
