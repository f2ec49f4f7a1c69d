"""The TPU's kernel that turns heads and moves them, interpreted on a CPU, against the model's rotary embeddings."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch

from gemma_xla.model.attention import Mask
from gemma_xla.model.config import GemmaConfig
from gemma_xla.model.layers import GemmaAttention, apply_rope, rope_table
from gemma_xla.sharding import MeshShape
from gemma_xla.xla import attention
from gemma_xla.xla.heads import heads_first

B, T, H = 2, 384, 256
SCALE = H**-0.5


def rows(heads: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """``[B, T, heads, H]``."""
    return torch.randn(B, T, heads, H, generator=torch.Generator().manual_seed(heads)).to(dtype)


def angles() -> tuple[torch.Tensor, torch.Tensor]:
    """Of documents that begin anew, and elsewhere in each row."""
    position_ids = torch.arange(T).repeat(B, 1)
    position_ids[0, 100:] -= 100
    return rope_table(position_ids, H, 10000.0)


def tables() -> list[np.ndarray]:
    return [table.squeeze(2).numpy() for table in angles()]


@pytest.mark.parametrize("heads", [1, 3])
def test_it_turns_and_moves_and_multiplies(heads):
    x = rows(heads)
    function = heads_first(heads, MeshShape(), turned=True, scale=SCALE, interpret=True)
    expected = apply_rope(x, *angles()).transpose(1, 2) * SCALE
    np.testing.assert_allclose(function(x.numpy(), *tables()), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("heads", [1, 3])
def test_back_is_the_gradient(heads):
    x, grad = rows(heads).requires_grad_(), rows(heads + 1)[:, :, :heads].transpose(1, 2).contiguous()
    (apply_rope(x, *angles()).transpose(1, 2) * SCALE).backward(grad)
    function = heads_first(heads, MeshShape(), turned=True, scale=SCALE, back=True, interpret=True)
    np.testing.assert_allclose(function(grad.numpy(), *tables()), x.grad, rtol=0, atol=1e-6)


def test_it_rounds_as_the_model_does():
    # Turned in float32, and rounded once; a power of two changes nothing of that.
    x = rows(2, torch.bfloat16)
    function = heads_first(2, MeshShape(), turned=True, scale=SCALE, interpret=True)
    found = function(jax.numpy.asarray(x.float().numpy(), jax.numpy.bfloat16), *tables())
    expected = apply_rope(x, *angles()).transpose(1, 2) * SCALE
    assert found.dtype == jax.numpy.bfloat16
    exact = torch.from_numpy(np.array(found.astype("float32"))) == expected.float()
    # The order of a multiplication and an addition may be another, or they may be one operation.
    assert exact.float().mean() > 0.999
    np.testing.assert_allclose(found.astype("float32"), expected.float(), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("back", [False, True])
def test_it_moves_only(back):
    x = rows(3, torch.float32).numpy()
    x = np.moveaxis(x, 2, 1).copy() if back else x
    found = heads_first(3, MeshShape(), turned=False, back=back, interpret=True)(x)
    np.testing.assert_array_equal(found, np.swapaxes(x, 1, 2))


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_a_layer_with_it_computes_what_it_did(monkeypatch, kv_heads):
    def interpreted(tensors, scale, mesh, back=False):
        heads = tensors[0].shape[1 if back else 2]
        turned = len(tensors) > 1
        function = heads_first(heads, mesh, turned=turned, scale=scale, back=back, interpret=True)
        out = function(*(jax.numpy.asarray(x.float().numpy(), str(x.dtype).removeprefix("torch.")) for x in tensors))
        assert out.dtype == jax.numpy.bfloat16
        used.append(turned)
        return torch.from_numpy(np.array(out.astype("float32"))).bfloat16()

    used = []
    monkeypatch.setattr(attention, "_moved", interpreted)
    torch.manual_seed(0)
    config = GemmaConfig(32, 64, 64, 1, 2, kv_heads, head_dim=H)
    layer = GemmaAttention(config, 0, "reference").bfloat16()
    x, grad = (torch.randn(B, T, 64, dtype=torch.bfloat16) for _ in range(2))
    results = []
    for _ in range(2):
        leaves = [x.clone().requires_grad_(), *layer.parameters()]
        out = layer(leaves[0], *angles(), Mask())
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
        attention.use_heads_first(layer, MeshShape())
    for plain, found in zip(*results, strict=True):
        scale = plain.abs().max().item()
        torch.testing.assert_close(found, plain, rtol=0, atol=2**-7 * scale)
    # Queries and keys, values where there are several heads of them; and back.
    assert sorted(used) == 2 * (kv_heads - 1) * [False] + 4 * [True]
    # Rows that it does not take go the plain way.
    short = layer(x[:, :100], *(table[:, :100] for table in angles()), Mask())
    torch.testing.assert_close(short, results[0][0][:, :100], rtol=0, atol=2**-7 * short.abs().max().item())


def test_heads_of_another_size_stay_as_they_are():
    layer = GemmaAttention(GemmaConfig(32, 64, 64, 1, 2, 1, head_dim=128), 0, "reference")
    attention.use_heads_first(layer, MeshShape())
    assert layer.scale == 128**-0.5
    assert "turned" not in vars(layer)
