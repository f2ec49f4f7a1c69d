"""Each part of a layer against its counterpart in `transformers`: outputs, input gradients and weight gradients."""

from __future__ import annotations

import pytest
import torch
from transformers.models.gemma import modeling_gemma as hf

from gemma_xla.model.attention import Mask
from gemma_xla.model.layers import RMSNorm, _Turn, apply_rope, rope_table
from tests.reference import (
    IMPLS,
    SHAPES,
    assert_close,
    assert_gradients_close,
    cast_reference,
    gradients,
    ours_from,
    pair,
    random_ids,
    reference_model,
)

B, T = 2, 9
every_shape = pytest.mark.parametrize("shape", SHAPES)
every_impl = pytest.mark.parametrize("impl", IMPLS)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def compare(ours, theirs, x: torch.Tensor, run_ours=None, run_theirs=None) -> None:
    """Same output for ``x``, same gradient of ``x`` and of every weight under the same random cotangent."""
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y_ours, y_theirs = (run_ours or ours)(x_ours), (run_theirs or theirs)(x_theirs)
    assert_close(y_ours, y_theirs, "output")
    cotangent = normal(*y_theirs.shape, seed=1)
    expected = gradients(theirs, (y_theirs * cotangent).sum())
    assert_gradients_close(gradients(ours, (y_ours * cotangent).sum()), expected)
    assert_close(x_ours.grad, x_theirs.grad, "input gradient")


# eps decides the result for the small inputs.
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_rms_norm(scale):
    ours, theirs = RMSNorm(48, 1e-6), hf.GemmaRMSNorm(48, eps=1e-6)
    theirs.weight.data.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(0))
    ours.load_state_dict(theirs.state_dict())
    compare(ours, theirs, scale * normal(B, T, 48))


def test_rms_norm_rounds_once_in_bfloat16():
    ours, theirs = RMSNorm(48, 1e-6), hf.GemmaRMSNorm(48, eps=1e-6)
    theirs.weight.data.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(0))
    ours.load_state_dict(theirs.state_dict())
    x = normal(B, T, 48).bfloat16()
    y = ours(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, theirs(x))


def test_mlp():
    ours, theirs = pair(SHAPES["gqa-16"], "reference")
    compare(ours.model.layers[0].mlp, theirs.model.layers[0].mlp, normal(B, T, 48))


@pytest.mark.parametrize("head_dim", [2, 16, 256])
@pytest.mark.parametrize("theta", [500.0, 10000.0])
def test_rotary_embedding(head_dim, theta):
    config = SHAPES["gqa-16"].replace(head_dim=head_dim, rope_theta=theta)
    rotary = hf.GemmaRotaryEmbedding(reference_model(config).config)
    # Two rows that differ, far apart positions and a restart, as packing and decoding have them.
    position_ids = torch.tensor([[0, 1, 2, 3, 0, 1], [5, 4095, 8191, 17, 1000, 0]])
    q, k = normal(2, 6, 4, head_dim), normal(2, 6, 2, head_dim, seed=1)
    cos, sin = rotary(q, position_ids)
    q_theirs, k_theirs = hf.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)

    cos, sin = rope_table(position_ids, head_dim, theta)

    assert_close(apply_rope(q, cos, sin), q_theirs, "q")
    assert_close(apply_rope(k, cos, sin), k_theirs, "k")


def test_rope_turns_bfloat16_with_float32_tables():
    cos, sin = rope_table(torch.arange(64)[None], 256, 10000.0)
    assert cos.dtype == sin.dtype == torch.float32
    x = normal(1, 64, 2, 256).bfloat16()
    turned = apply_rope(x, cos, sin)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, apply_rope(x.float(), cos, sin).bfloat16())


@pytest.mark.parametrize("head_dim", [2, 16, 256])
def test_rope_as_a_product_is_the_same(head_dim):
    """What runs on XLA: to the bit forward, and its gradient rounded once."""
    cos, sin = rope_table(torch.arange(64)[None], head_dim, 10000.0)
    x, grad = (normal(2, 64, 3, head_dim, seed=seed).bfloat16() for seed in (0, 1))
    turned = _Turn.apply(x.requires_grad_(), cos, sin)
    assert torch.equal(turned, apply_rope(x, cos, sin))
    (ours,) = torch.autograd.grad(turned, x, grad)
    exact = x.detach().double().requires_grad_()
    a, b = exact.chunk(2, dim=-1)
    (exact_grad,) = torch.autograd.grad(torch.cat((a * cos - b * sin, b * cos + a * sin), -1), exact, grad.double())
    # Half of bfloat16's last digit, and float32's beside it.
    torch.testing.assert_close(ours.double(), exact_grad, rtol=2**-8 * 1.01, atol=1e-6)


def causal_inputs(theirs, head_dim: int, theta: float):
    """Position tables and causal masks for both sides."""
    position_ids = torch.arange(T)[None]
    additive = torch.full((T, T), torch.finfo(torch.float32).min).triu(1)[None, None]
    tables = theirs.model.rotary_emb(torch.empty(0), position_ids)
    return rope_table(position_ids, head_dim, theta), tables, additive


@every_shape
@every_impl
def test_attention(shape, impl):
    config = SHAPES[shape]
    ours, theirs = pair(config, impl)
    (cos, sin), tables, additive = causal_inputs(theirs, config.head_dim, config.rope_theta)
    attn, ref = ours.model.layers[1].self_attn, theirs.model.layers[1].self_attn
    compare(
        attn,
        ref,
        normal(B, T, 48),
        lambda x: attn(x, cos, sin, Mask()),
        lambda x: ref(x, position_embeddings=tables, attention_mask=additive)[0],
    )


@every_shape
@every_impl
def test_decoder_layer(shape, impl):
    config = SHAPES[shape]
    ours, theirs = pair(config, impl)
    (cos, sin), tables, additive = causal_inputs(theirs, config.head_dim, config.rope_theta)
    layer, ref = ours.model.layers[1], theirs.model.layers[1]
    compare(
        layer,
        ref,
        normal(B, T, 48),
        lambda x: layer(x, cos, sin, Mask()),
        lambda x: ref(x, attention_mask=additive, position_embeddings=tables),
    )


def first_layer_input(model, ids: torch.Tensor) -> torch.Tensor:
    seen = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(ids)
    handle.remove()
    return seen[0]


# 48**0.5 is not a bfloat16 number: a factor kept in float32 would give other bits.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding_scale(dtype):
    config = SHAPES["gqa-16"]
    theirs = cast_reference(reference_model(config), dtype)
    ours = ours_from(theirs, config, "reference")
    ids = random_ids(config, B, T)
    h_ours, h_theirs = first_layer_input(ours, ids), first_layer_input(theirs, ids)
    assert h_ours.dtype == dtype
    assert torch.equal(h_ours, h_theirs)
