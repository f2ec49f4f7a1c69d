"""The chunked loss against PyTorch's own cross entropy, and the proof that full logits never exist."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gemma_xla.model.config import PRESETS
from gemma_xla.model.gemma import Gemma, init_parameter
from gemma_xla.model.loss import Layout, chunked_cross_entropy
from tests.reference import assert_close, random_ids, summed_loss

B, T, D, V = 2, 10, 24, 57


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, output embedding, labels of which some are not counted; logits are of size 3 or so."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(B, T, D, generator=generator)
    weight = 3 * D**-0.5 * torch.randn(V, D, generator=generator)
    labels = torch.randint(0, V, (B, T), generator=generator)
    labels[0, :4] = labels[1, 7] = -100
    return h.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def chunked(h, weight, labels, chunk: int, factor: float = 1.0, parts: int = 1):
    """Loss and gradients of ``factor`` times the loss."""
    loss = chunked_cross_entropy(h, weight, labels, chunk, Layout(parts))
    return loss, *torch.autograd.grad(factor * loss, (h, weight))


def plain(h, weight, labels, factor: float = 1.0):
    loss = summed_loss(h @ weight.T, labels)
    return loss, *torch.autograd.grad(factor * loss, (h, weight))


def assert_same(actual, expected) -> None:
    for what, got, want in zip(("loss", "hidden gradient", "weight gradient"), actual, expected, strict=True):
        assert_close(got, want, what)


# 10 positions: 3 and 7 do not divide them, 64 exceeds them.
@pytest.mark.parametrize("chunk", [1, 3, 5, 7, 10, 64])
def test_equals_plain_cross_entropy_for_any_chunk(chunk):
    actual = chunked(*inputs(), chunk)
    assert actual[0].dtype == torch.float32
    assert actual[0].shape == ()
    assert_same(actual, plain(*inputs()))


def test_parts_of_a_batch_add_up():
    assert_same(chunked(*inputs(), 4, parts=2), plain(*inputs()))


def test_equals_plain_cross_entropy_of_float64():
    assert_same(chunked(*inputs(torch.float64), 4), plain(*inputs(torch.float64)))


def test_gradients_scale_with_the_factor_of_the_loss():
    assert_same(chunked(*inputs(), 4, factor=-0.125), plain(*inputs(), factor=-0.125))


def test_gradients_agree_with_finite_differences():
    h, weight, labels = inputs(torch.float64)
    _, grad_h, grad_weight = chunked(h, weight, labels, 4)
    # The loss is a float32: a step along the gradient large enough that rounding does not matter.
    for tensor, grad in ((h, grad_h), (weight, grad_weight)):
        step = 1e-3 * grad / grad.norm()
        with torch.no_grad():
            tensor += step
            up = chunked_cross_entropy(h, weight, labels, 4)
            tensor -= 2 * step
            down = chunked_cross_entropy(h, weight, labels, 4)
            tensor += step
        assert (up - down).item() / 2e-3 == pytest.approx(grad.norm().item(), rel=2e-2)


def test_without_gradients_it_is_the_same_number():
    h, weight, labels = inputs()
    expected = plain(h, weight, labels)[0]
    with torch.no_grad():
        assert_close(chunked_cross_entropy(h, weight, labels, 3), expected)
    assert_close(chunked_cross_entropy(h.detach(), weight.detach(), labels, 3), expected)


def test_frozen_inputs_get_no_gradient():
    h, weight, labels = inputs()
    _, grad_h, grad_weight = plain(h, weight, labels)
    weight.requires_grad_(False)
    chunked_cross_entropy(h, weight, labels, 3).backward()
    assert weight.grad is None
    assert_close(h.grad, grad_h)

    h, weight, labels = inputs()
    h.requires_grad_(False)
    chunked_cross_entropy(h, weight, labels, 3).backward()
    assert h.grad is None
    assert_close(weight.grad, grad_weight)


@pytest.mark.parametrize("chunk", [3, 64])
def test_nothing_to_learn_costs_nothing(chunk):
    h, weight, labels = inputs()
    loss, grad_h, grad_weight = chunked(h, weight, torch.full_like(labels, -100), chunk)
    assert loss.item() == 0.0
    assert not grad_h.any()
    assert not grad_weight.any()


def test_uncounted_positions_get_no_gradient():
    h, weight, labels = inputs()
    _, grad_h, _ = chunked(h, weight, labels, 3)
    assert not grad_h[labels == -100].any()
    assert grad_h[labels != -100].any(dim=-1).all()


def test_large_logits_stay_finite():
    h, weight, labels = inputs()
    h = (1e4 * h.detach()).requires_grad_()
    actual = chunked(h, weight, labels, 4)
    assert all(tensor.isfinite().all() for tensor in actual)
    assert_same(actual, plain(h, weight, labels))


def test_bfloat16_is_as_exact_as_plain_cross_entropy_in_bfloat16():
    """Against float64, errors of the same size as one bfloat16 product's over all positions, on average of 4 draws."""
    ratios = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        h = torch.randn(2, 64, 64, generator=generator).bfloat16().requires_grad_()
        weight = (0.4 * torch.randn(512, 64, generator=generator)).bfloat16().requires_grad_()
        labels = torch.randint(0, 512, (2, 64), generator=generator)
        truth = plain(h.detach().double().requires_grad_(), weight.detach().double().requires_grad_(), labels)
        ours, theirs = chunked(h, weight, labels, 16), plain(h, weight, labels)
        assert ours[0].dtype == torch.float32
        assert ours[1].dtype == ours[2].dtype == torch.bfloat16
        assert_close(ours[0], theirs[0], "loss")
        errors = [((x.double() - y).abs(), (z.double() - y).abs()) for x, y, z in zip(ours, truth, theirs, strict=True)]
        ratios.append([[a.mean() / b.mean(), a.max() / b.max()] for a, b in errors[1:]])
    assert torch.tensor(ratios).mean(0).max() <= 1.1


def test_many_bfloat16_chunks_lose_nothing():
    """Summing 512 chunks' weight gradients in bfloat16 would drop most of them."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(1, 512, D, generator=generator).bfloat16()
    weight = torch.randn(V, D, generator=generator).mul(0.1).bfloat16()
    labels = torch.randint(0, V, (1, 512), generator=generator)
    one = chunked(h.requires_grad_(), weight.requires_grad_(), labels, 512)[2]
    many = chunked(h, weight, labels, 1)[2]
    assert_close(many, one, tolerance=2**-7)


class LargestTensor(TorchDispatchMode):
    """Records the most elements in any tensor produced, and in any whose last dimension is the vocabulary."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size, self.elements, self.vocab_elements = vocab_size, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
                if tensor.shape[-1:] == (self.vocab_size,):
                    self.vocab_elements = max(self.vocab_elements, tensor.numel())
        return out


@pytest.mark.parametrize("attention", ["reference", "sdpa"])
def test_full_logits_never_exist(attention):
    config, rows, length, chunk = PRESETS["gemma-test"], 2, 64, 24
    model = Gemma(config, attention)
    for name, parameter in model.named_parameters():
        init_parameter(name, parameter, config, seed=0)
    ids, labels = random_ids(config, rows, length), random_ids(config, rows, length, seed=1)
    full = rows * length * config.vocab_size

    with LargestTensor(config.vocab_size) as plain_run:
        summed_loss(model(ids), labels).backward()
    assert plain_run.elements >= full  # The instrument sees full logits where there are some.

    with LargestTensor(config.vocab_size) as training:
        model(ids, shift_labels=labels, loss_chunk=chunk).backward()
    assert training.elements < full
    assert training.vocab_elements == rows * chunk * config.vocab_size

    with LargestTensor(config.vocab_size) as evaluation, torch.no_grad():
        model(ids, shift_labels=labels, loss_chunk=chunk)
    assert evaluation.elements < full
