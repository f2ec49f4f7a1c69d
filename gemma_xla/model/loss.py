"""Cross entropy over a large vocabulary without the full logits.

For Gemma, one row of 8192 positions has 8.4 GB of float32 logits. Here the logits of a few hundred positions exist at a
time, and their gradient is taken at once, while they are there: nothing of size ``[B, T, V]`` is kept or recomputed.

Shape letters: B batch rows, P parts of them, T positions, C positions in a chunk, D hidden_size, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

IGNORE_INDEX = -100

Tensors = list[torch.Tensor]


class Layout:
    """Where the loss is computed, and in what order: here on one device, one chunk after the other.

    Attributes:
        parts: equal parts of the batch that lie on devices of their own, though the tensors look whole. The gradient of
            the output embedding is added up in each of them, and over them once.
    """

    def __init__(self, parts: int = 1) -> None:
        self.parts = parts

    def apart(self, x_P: torch.Tensor) -> torch.Tensor:
        """Split a tensor's first dimension, which is `parts` long, over the devices."""
        return x_P

    def fold(
        self, step: Callable[[Tensors, Tensors], tuple[Tensors, torch.Tensor]], carry: Tensors, chunks: list[Tensors]
    ) -> tuple[Tensors, Tensors]:
        """Call ``step`` with what is carried and a chunk, again and again; return what is carried and all results."""
        results = []
        for chunk in chunks:
            carry, result = step(carry, chunk)
            results.append(result)
        return carry, results


def chunked_cross_entropy(
    h_BTD: torch.Tensor,
    weight_VD: torch.Tensor,
    shift_labels_BT: torch.Tensor,
    chunk: int = 512,
    layout: Layout | None = None,
) -> torch.Tensor:
    """Sum over positions of ``-log softmax(h @ weight.T)[label]``, a float32 scalar.

    Args:
        h_BTD: final hidden states.
        weight_VD: the output embedding.
        shift_labels_BT: the token that follows each position (already shifted); -100: not counted.
        chunk: positions per row whose logits exist at one time.
        layout: None: one device.
    """
    if torch.is_grad_enabled() and (h_BTD.requires_grad or weight_VD.requires_grad):
        return _ChunkedCrossEntropy.apply(h_BTD, weight_VD, shift_labels_BT, chunk, layout or Layout())
    chunks, ids_V = _chunks(h_BTD, shift_labels_BT, chunk), _ids(weight_VD)
    return sum(_nll(h_BCD @ weight_VD.T, labels_BC, ids_V)[0] for h_BCD, labels_BC in chunks)


def loss_and_hits(
    h_BTD: torch.Tensor, weight_VD: torch.Tensor, shift_labels_BT: torch.Tensor, chunk: int = 512
) -> torch.Tensor:
    """`chunked_cross_entropy`, and how many labels are the likeliest token: ``[2]``, float32. For evaluation."""
    total, ids_V = torch.zeros(2, device=h_BTD.device), _ids(weight_VD)
    for h_BCD, labels_BC in _chunks(h_BTD, shift_labels_BT, chunk):
        logits_BCV = (h_BCD @ weight_VD.T).float()
        nll, _ = _nll(logits_BCV, labels_BC, ids_V)
        hit_BC = (_picked(logits_BCV, labels_BC, ids_V) == logits_BCV.amax(-1)) & (labels_BC != IGNORE_INDEX)
        total = total + torch.stack([nll, hit_BC.sum().float()])
    return total


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_BTD, weight_VD, shift_labels_BT, chunk, layout: Layout):
        trains = ctx.needs_input_grad[1]

        def step(carry: Tensors, inputs: Tensors) -> tuple[Tensors, torch.Tensor]:
            (total, weight_VD, *sums_PVD), (h_BCD, labels_BC) = carry, inputs
            nll, grad_logits_BCV = _nll(h_BCD @ weight_VD.T, labels_BC, _ids(weight_VD), with_grad=True)
            grad_logits_BCV = grad_logits_BCV.to(h_BCD.dtype)
            # What is not counted is left out where rows are narrow.
            counted_BC1 = (labels_BC != IGNORE_INDEX)[..., None]
            if trains:
                apart = ((x.unflatten(0, (layout.parts, -1))) for x in (grad_logits_BCV, h_BCD * counted_BC1))
                sums_PVD = [sums_PVD[0] + torch.einsum("pbcv,pbcd->pvd", *apart).float()]
            return [total + nll, weight_VD, *sums_PVD], (grad_logits_BCV @ weight_VD) * counted_BC1

        carry = [torch.zeros((), dtype=torch.float32, device=h_BTD.device), weight_VD]
        if trains:
            # Each chunk adds to every entry: bfloat16 would lose the small ones.
            shape = (layout.parts, *weight_VD.shape)
            carry.append(layout.apart(torch.zeros(shape, dtype=torch.float32, device=h_BTD.device)))
        chunks = [list(inputs) for inputs in _chunks(h_BTD, shift_labels_BT, chunk)]
        (total, _, *sums_PVD), grad_h = layout.fold(step, carry, chunks)
        ctx.save_for_backward(torch.cat(grad_h, dim=1), sums_PVD[0].sum(0) if trains else None)
        ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx, grad_output):
        grad_h_BTD, grad_weight_VD = ctx.saved_tensors
        grad_h_BTD = (grad_h_BTD * grad_output).to(grad_h_BTD.dtype)
        if grad_weight_VD is not None:
            grad_weight_VD = (grad_weight_VD * grad_output).to(ctx.weight_dtype)
        return grad_h_BTD, grad_weight_VD, None, None, None


def _chunks(h_BTD, labels_BT, chunk):
    # Along T, never along B: rows live on different devices.
    return zip(h_BTD.split(chunk, dim=1), labels_BT.split(chunk, dim=1), strict=True)


def _nll(logits_BCV, labels_BC, ids_V, with_grad: bool = False):
    """The chunk's summed loss and, when asked for, its gradient with respect to the logits, both float32.

    The gradient's rows of positions that are not counted hold anything. Elsewhere than on XLA, which fuses what comes
    one after the other, it takes the place of the probabilities.
    """
    logits_BCV = logits_BCV.float()
    counted_BC = labels_BC != IGNORE_INDEX
    if ids_V is not None:
        # The largest goes first: beside a logit of some hundreds the rounding of the sum's logarithm would show.
        logits_BCV = logits_BCV - logits_BCV.amax(-1, keepdim=True)
        lse_BC = torch.exp(logits_BCV).sum(-1).log()
        nll = torch.where(counted_BC, lse_BC - _picked(logits_BCV, labels_BC, ids_V), 0.0).sum()
        if not with_grad:
            return nll, None
        return nll, torch.exp(logits_BCV - lse_BC[..., None]) - _is_label(labels_BC, ids_V).float()
    log_probs_BCV = torch.log_softmax(logits_BCV, dim=-1)
    nll = -torch.where(counted_BC, _picked(log_probs_BCV, labels_BC, ids_V), 0.0).sum()
    if not with_grad:
        return nll, None
    place_BC1 = _place(labels_BC)
    minus_one_BC1 = torch.full_like(place_BC1, -1.0, dtype=torch.float32)
    return nll, log_probs_BCV.exp_().scatter_add_(-1, place_BC1, minus_one_BC1)


def _ids(weight_VD):
    """All token ids, where labels are found by comparison; made once, since they become a constant of the graph."""
    if weight_VD.device.type != "xla":
        return None
    return torch.arange(weight_VD.shape[0], dtype=torch.int32, device=weight_VD.device)


def _picked(values_BCV, labels_BC, ids_V):
    """The entry of each label, ``[B, C]``; anything where there is no label."""
    if ids_V is not None:
        return torch.where(_is_label(labels_BC, ids_V), values_BCV, 0.0).sum(-1)
    return values_BCV.gather(-1, _place(labels_BC))[..., 0]


def _is_label(labels_BC, ids_V):
    # A comparison instead of gather and scatter: XLA fuses it, and it splits along V. In 32 bits: a TPU has no more.
    return ids_V == labels_BC[..., None].int()


def _place(labels_BC):
    """Where to gather and scatter: each label, or 0 where there is none."""
    return labels_BC.clamp_min(0)[..., None]
