"""Masks against loops over pairs, attention against a softmax per query written out in float64."""

from __future__ import annotations

import pytest
import torch

from gemma_xla.model.attention import Mask, attend
from tests.reference import IMPLS, assert_close

SEGMENTS = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 3, 0, 0], [0, 0, 7, 7, 7, 7, 7, 7, 7, 7]])
S = SEGMENTS.shape[1]
every_impl = pytest.mark.parametrize("impl", IMPLS)
every_window = pytest.mark.parametrize("window", [None, 1, 3, 10, 99])
with_and_without_segments = pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["one-document", "packed"])


def brute_force(segments: torch.Tensor | None, window: int | None, queries=range(S)) -> torch.Tensor:
    """Who sees whom, pair by pair: ``[B, T, S]``."""
    rows = [[0] * S] if segments is None else segments.tolist()
    return torch.tensor(
        [
            [[k <= q and row[k] == row[q] and (window is None or q - k < window) for k in range(S)] for q in queries]
            for row in rows
        ]
    )


def spelled_out(q_BTNH, k_BSKH, v_BSKH, visible_BTS) -> torch.Tensor:
    """One query, one head at a time, over its visible keys only, in float64."""
    q, k, v = q_BTNH.double(), k_BSKH.double(), v_BSKH.double()
    group = q.shape[2] // k.shape[2]
    out = torch.zeros_like(q)
    for b, t, n in torch.cartesian_prod(*(torch.arange(size) for size in q.shape[:3])).tolist():
        sees = visible_BTS[b if len(visible_BTS) > 1 else 0, t]
        scores = k[b, sees, n // group] @ q[b, t, n] / q.shape[3] ** 0.5
        weights = scores.exp() / scores.exp().sum()
        out[b, t, n] = weights @ v[b, sees, n // group]
    return out


def qkv(kv_heads: int = 2, head_dim: int = 8, requires_grad: bool = False) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = (4, kv_heads, kv_heads)
    return [torch.randn(2, S, n, head_dim, generator=generator).requires_grad_(requires_grad) for n in heads]


@every_window
@with_and_without_segments
def test_mask_equals_the_pairwise_rule(segments, window):
    dense = Mask(segments).dense(S, window, torch.device("cpu"))
    assert dense.dtype == torch.bool
    assert torch.equal(dense[:, 0], brute_force(segments, window))


def test_one_mask_serves_layers_of_different_windows():
    mask = Mask(SEGMENTS)
    for window in (None, 2, None, 4):
        assert torch.equal(mask.dense(S, window, torch.device("cpu"))[:, 0], brute_force(SEGMENTS, window))


@every_window
@with_and_without_segments
@pytest.mark.parametrize("queries", [[S - 1], [4], [2, 3, 4], [9, 0]])
def test_mask_of_few_queries_is_rows_of_the_full_mask(segments, window, queries):
    device = torch.device("cpu")
    few = Mask(segments, torch.tensor(queries)).dense(S, window, device)
    assert torch.equal(few, Mask(segments).dense(S, window, device)[:, :, queries])
    assert torch.equal(few[:, 0], brute_force(segments, window, queries))


@every_impl
@every_window
@with_and_without_segments
def test_attention_equals_a_softmax_over_visible_keys(impl, window, segments):
    q, k, v = qkv()
    out = attend(q, k, v, Mask(segments), window=window, impl=impl)
    assert_close(out, spelled_out(q, k, v, brute_force(segments, window)))


@every_impl
@pytest.mark.parametrize("segments", [None, SEGMENTS])
def test_scores_are_multiplied_by_what_is_asked_for(impl, segments):
    q, k, v = qkv()
    out = attend(q, k, v, Mask(segments), scale=0.7, impl=impl)
    assert_close(out, spelled_out(0.7 * q.shape[-1] ** 0.5 * q, k, v, brute_force(segments, None)))


@every_impl
@pytest.mark.parametrize("head_dim", [8, 256])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_gradients_of_shared_heads(impl, head_dim, kv_heads):
    inputs = qkv(kv_heads, head_dim, requires_grad=True)
    cotangent = torch.randn(2, S, 4, head_dim, generator=torch.Generator().manual_seed(1))
    out = attend(*inputs, Mask(SEGMENTS), window=3, impl=impl)
    expected = spelled_out(*inputs, brute_force(SEGMENTS, 3))
    assert_close(out, expected)
    wanted = torch.autograd.grad((expected * cotangent).sum(), inputs)
    for name, got, want in zip("qkv", torch.autograd.grad((out * cotangent).sum(), inputs), wanted, strict=True):
        assert_close(got, want, f"gradient of {name}")


@every_impl
@every_window
@with_and_without_segments
def test_decoding_one_query_equals_its_row_of_full_attention(impl, window, segments):
    q, k, v = qkv()
    full = attend(q, k, v, Mask(segments), window=window, impl=impl)
    for t in (0, 5, S - 1):
        one = attend(q[:, [t]], k, v, Mask(segments, torch.tensor([t])), window=window, impl=impl)
        assert_close(one, full[:, [t]], f"position {t}", tolerance=1e-6)


@every_impl
def test_a_query_with_nothing_to_see_stays_finite(impl):
    q, k, v = qkv(requires_grad=True)
    # Queries 0 to 4 stand before the first key.
    mask = Mask(None, torch.arange(S) - 5)
    out = attend(q, k, v, mask, impl=impl)
    out.sum().backward()
    for tensor in (out, q.grad, k.grad, v.grad):
        assert tensor.isfinite().all()
    assert_close(out[:, 5:], spelled_out(q[:, 5:], k, v, brute_force(None, None, range(S - 5))))


@every_impl
def test_large_scores_do_not_overflow(impl):
    q, k, v = qkv()
    out = attend(1e4 * q, 1e4 * k, v, Mask(), impl=impl)
    # The largest score takes all: every output is one of the values seen.
    assert out.isfinite().all()
    assert torch.equal(out[:, 0], v[:, 0].repeat_interleave(2, dim=1))


@every_impl
def test_bfloat16_keeps_its_dtype_and_precision(impl):
    q, k, v = (x.bfloat16() for x in qkv(head_dim=256))
    out = attend(q, k, v, Mask(SEGMENTS), impl=impl)
    assert out.dtype == torch.bfloat16
    # Twice the rounding step of bfloat16: scores, weights and output are each rounded once.
    assert_close(out, spelled_out(q, k, v, brute_force(SEGMENTS, None)), tolerance=2**-7)


@pytest.mark.parametrize("length", [100, 300, 1100])
@pytest.mark.parametrize("window", [None, 150])
def test_blocks_of_queries_give_what_all_at_once_do(length, window):
    generator = torch.Generator().manual_seed(0)
    segments = torch.arange(length).mul(3).div(length, rounding_mode="floor").repeat(2, 1)
    results = {}
    tensors = [torch.randn(2, length, heads, 8, generator=generator) for heads in (4, 2, 2)]
    upstream = torch.randn(tensors[0].shape, generator=generator)
    for impl in ("reference", "blocks"):
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = attend(*leaves, Mask(segments), window=window, impl=impl)
        results[impl] = [out, *torch.autograd.grad(out, leaves, upstream)]
    for one, other in zip(results["blocks"], results["reference"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
