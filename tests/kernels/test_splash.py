"""The TPU's attention kernel, interpreted on a CPU, against the model's reference attention."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gemma_xla.model.attention import Mask, attend
from gemma_xla.sharding import MeshShape
from gemma_xla.xla.splash import Attention

B, T, H = 2, 256, 128


def rows(heads: int, seed: int) -> torch.Tensor:
    """``[B, T, heads, H]``, float32."""
    return torch.randn(B, T, heads, H, generator=torch.Generator().manual_seed(seed))


def to_jax(x_BTNH: torch.Tensor) -> np.ndarray:
    return x_BTNH.detach().transpose(1, 2).numpy()


def packed() -> torch.Tensor:
    """Documents that begin within blocks and at their edges, and padding: ``[B, T]``."""
    ids = torch.ones(B, T, dtype=torch.int32)
    ids[0, 100:] = 2
    ids[0, 128:] = 3
    ids[0, 250:] = 0
    ids[1, 1:] = 2
    return ids


@pytest.mark.parametrize(
    ("heads", "kv_heads", "window", "segmented", "groups"),
    [
        (4, 1, None, True, 1),
        (4, 1, None, True, 2),
        (4, 1, None, False, 1),
        (4, 4, None, True, 2),
        (4, 4, None, False, 1),
        (4, 2, None, True, 1),
        (4, 2, None, False, 2),
        (3, 1, None, True, 2),  # cannot be shared out
        (2, 1, 100, True, 1),
        (2, 1, 100, False, 2),
    ],
)
def test_the_kernel_equals_the_reference(heads, kv_heads, window, segmented, groups):
    q, k, v, grad = (rows(n, seed) for seed, n in enumerate((heads, kv_heads, kv_heads, heads)))
    ids = packed() if segmented else None
    for x in (q, k, v):
        x.requires_grad_()
    expected = attend(q, k, v, Mask(ids), window=window, impl="reference")
    expected.backward(grad)

    attention = Attention(kv_heads, T, window, MeshShape(), segmented, groups, interpret=True)
    segments = [] if ids is None else [ids.numpy()]
    inputs = to_jax(q * H**-0.5), to_jax(k), to_jax(v)
    out, lse = attention.forward()(*inputs, *segments)
    dq, dk, dv = attention.backward()(*inputs, out, lse, to_jax(grad), *segments)

    near = {"rtol": 0, "atol": 1e-5}
    np.testing.assert_allclose(out, to_jax(expected), **near)
    for found, tensor, scale in ((dq, q, H**-0.5), (dk, k, 1.0), (dv, v, 1.0)):
        np.testing.assert_allclose(np.asarray(found) * scale, to_jax(tensor.grad), **near)
