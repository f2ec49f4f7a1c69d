"""The kernel of attention's gradients, interpreted on a CPU, against the model's reference attention."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from gemma_xla.model.attention import Mask, attend
from gemma_xla.xla.flash_backward import fits, flash_backward, steps

T, H = 512, 128


def made(heads: int, kv_heads: int) -> list[torch.Tensor]:
    """Queries, keys, values and a gradient, ``[1, T, heads, H]``, float32."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, T, n, H, generator=generator) for n in (heads, kv_heads, kv_heads, heads)]


def packed() -> torch.Tensor:
    """Documents that begin within blocks and at their edges, one that begins again, and padding: ``[1, T]``."""
    ids = torch.ones(1, T, dtype=torch.int32)
    for start, number in ((100, 2), (128, 3), (300, 1), (301, 4), (500, 0)):
        ids[0, start:] = number
    return ids


def to_jax(x: torch.Tensor) -> np.ndarray:
    return x.detach()[0].transpose(0, 1).contiguous().numpy()


@pytest.mark.parametrize("blocks", [(128, 128), (256, 128)])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "window", "segmented"),
    [
        (2, 1, None, True),
        (2, 2, None, False),
        (4, 2, None, True),
        (2, 1, 1, True),
        (2, 1, 129, False),
        (2, 2, 200, True),
    ],
)
def test_gradients_equal_the_reference(heads, kv_heads, window, segmented, blocks):
    q, k, v, grad = made(heads, kv_heads)
    ids = packed() if segmented else None
    for x in (q, k, v):
        x.requires_grad_()
    out = attend(q, k, v, Mask(ids), window=window, impl="reference")
    out.backward(grad)
    scale = H**-0.5
    scores = torch.einsum("btnh,bsnh->bnts", q * scale, k.repeat_interleave(heads // kv_heads, 2))
    lse = scores.masked_fill(~Mask(ids).dense(T, window, q.device), -torch.inf).logsumexp(-1)

    inputs = [to_jax(x) for x in (q * scale, k, v, out)]
    segments = None if ids is None else jnp.asarray(ids[0].numpy())
    found = flash_backward(
        *inputs, lse.detach()[0].numpy(), to_jax(grad), segments, window=window, blocks=blocks, interpret=True
    )

    for gradient, tensor, factor in zip(found, (q, k, v), (scale, 1.0, 1.0), strict=True):
        np.testing.assert_allclose(np.asarray(gradient) * factor, to_jax(tensor.grad), rtol=0, atol=2e-5)


@pytest.mark.parametrize("window", [None, 1, 128, 129, 130, 300])
def test_the_blocks_are_those_that_hold_something_to_see(window):
    table = steps(T, 128, window)

    visible = Mask().dense(T, window, torch.device("cpu"))[0, 0]
    expected = {(i, j) for i in range(4) for j in range(4) if visible[i * 128 :, j * 128 :][:128, :128].any()}
    assert set(zip(*table[:2].tolist(), strict=True)) == expected
    queries, keys, first, last, fresh = table
    for number in range(4):
        of_keys = np.flatnonzero(keys == number)
        assert first[of_keys].tolist() == [1] + [0] * (len(of_keys) - 1)
        assert last[of_keys].tolist() == [0] * (len(of_keys) - 1) + [1]
        assert queries[of_keys[0]] == number
        of_queries = np.flatnonzero(queries == number)
        assert fresh[of_queries].tolist() == [1] + [0] * (len(of_queries) - 1)
        # Complete when the block on the diagonal is done.
        assert keys[of_queries[-1]] == number


def test_long_rows_do_not_fit():
    assert fits(8192, 256)
    assert not fits(32768, 256)
