"""Products in 8 bits against float64: exact where integers are, and off by what rounding makes them where not."""

from __future__ import annotations

import dataclasses
import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from gemma_xla.config import TrainSection
from gemma_xla.errors import UserError
from gemma_xla.model.config import INT8_PRODUCTS
from gemma_xla.model.linear import LARGEST, MOST_SUMMED, Products, _on_gpu, int8_dot, linear, quantise
from gemma_xla.model.loss import Layout
from gemma_xla.train.checks import check_int8

ALL = Products(frozenset(INT8_PRODUCTS), False, int8_dot, lambda x: x, lambda x: x.T, lambda x: x, Layout())


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_quantised_values_are_within_half_a_step():
    x = normal(64, 1000, seed=0)
    values, scale = quantise(x, 1)
    assert (values.dtype, scale.shape) == (torch.int8, (64, 1))
    assert torch.equal(values.abs().amax(1), torch.full((64,), LARGEST, dtype=torch.int8))
    assert ((values * scale - x).abs() <= 0.5001 * scale).all()
    # Of a uniform error the mean square is a twelfth of the step's.
    assert (values * scale - x).div(scale).pow(2).mean() == pytest.approx(1 / 12, rel=0.02)


def test_zeros_stay_zeros():
    values, scale = quantise(torch.zeros(2, 3), 1)
    assert not values.any()
    assert torch.isfinite(scale).all()


def test_stochastic_rounding_is_right_on_average():
    x = torch.tensor([127.0, 0.25, -3.7, 126.9, -127.0]).repeat(20_000, 1)
    torch.manual_seed(0)
    values, scale = quantise(x, 1, stochastic=True)
    assert (scale == 1).all()
    assert ((values - x).abs() < 1).all()
    # Four standard errors of the widest.
    assert torch.allclose(values.double().mean(0), x[0].double(), rtol=0, atol=4 * 0.5 / math.sqrt(len(x)))
    assert set(values[:, 2].tolist()) == {-4, -3}


@pytest.mark.parametrize(
    ("left", "right", "dims", "einsum"),
    [
        ((2, 5, 3000), (7, 3000), (([2], [1]), ([], [])), "btk,nk->btn"),
        ((2, 5, 70), (70, 9), (([2], [0]), ([], [])), "btk,kn->btn"),
        ((3, 2100, 6), (3, 2100, 8), (([1], [1]), ([0], [0])), "pki,pkj->pij"),
    ],
    ids=["output", "grad_input", "grad_weight"],
)
@pytest.mark.parametrize("largest", [True, False])
def test_dots_are_exact(left, right, dims, einsum, largest):
    generator = torch.Generator().manual_seed(0)
    low = LARGEST if largest else -LARGEST
    a, b = (torch.randint(low, LARGEST + 1, shape, generator=generator).to(torch.int8) for shape in (left, right))
    result = int8_dot(a, b, dims)
    assert result.dtype == torch.int32
    assert torch.equal(result.long(), torch.einsum(einsum, a.long(), b.long()))


@pytest.mark.parametrize("shape", [(1, 1, 1), (16, 8, 8), (17, 16, 24), (40, 13, 9)], ids=str)
@pytest.mark.parametrize("turned", [False, True])
def test_a_gpu_is_given_shapes_that_it_takes(monkeypatch, shape, turned):
    def strict(a_MK, b_KN, int_mm=torch._int_mm):
        # As CUDA's checks in PyTorch 2.9; and the layout of which cuBLAS has kernels for every shape.
        assert a_MK.shape[0] > 16
        assert a_MK.shape[1] % 8 == b_KN.shape[1] % 8 == 0
        assert a_MK.is_contiguous()
        assert b_KN.T.is_contiguous()
        return int_mm(a_MK, b_KN)

    monkeypatch.setattr(torch, "_int_mm", strict)
    (M, N, K), generator = shape, torch.Generator().manual_seed(0)
    a, b = (torch.randint(-127, 128, (n, K), generator=generator).to(torch.int8) for n in (M, N))
    if turned:
        a, b = (x.T.contiguous().T for x in (a, b))
    result = _on_gpu(a, b)
    assert result.dtype == torch.int32
    assert torch.equal(result.long(), a.long() @ b.long().T)


def test_what_32_bits_hold():
    assert LARGEST**2 * MOST_SUMMED < 2**31 <= LARGEST**2 * (MOST_SUMMED + 1) + 1


@pytest.mark.parametrize(
    ("rows", "changes", "fits"),
    [
        (4160, {}, True),
        (4161, {}, False),
        (2 * 4160, {"grad_accum": 2}, True),
        (4161, {"int8_products": ["output", "grad_input"]}, True),
        (4161, {"precision": "default"}, True),
    ],
)
def test_sums_that_overflow_are_refused(tiny_config, tmp_path, rows, changes, fits):
    config = tiny_config(tmp_path / "run", "data.seq_len=32")
    train = TrainSection(**{"steps": 1, "batch_size": rows, "precision": "int8"} | changes)
    config = config.model_copy(update={"train": train})
    with nullcontext() if fits else pytest.raises(UserError, match="sums of more than 133144 overflow: raise"):
        check_int8(config, train.micro_batch_rows(1), 1)


def _linear(how: Products, dtype: torch.dtype = torch.float32):
    x, weight, grad = normal(4, 64, 96, seed=1), normal(128, 96, seed=2) / 10, normal(4, 64, 128, seed=3)
    x[0, 0] *= 3  # a row with its own scale
    x, weight = x.to(dtype).requires_grad_(), weight.requires_grad_()
    out = linear(x, weight, how)
    out.backward(grad.to(dtype))
    exact_x, exact_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    exact = F.linear(exact_x, exact_weight)
    exact.backward(grad.double())
    return {
        "output": (out, exact),
        "grad_input": (x.grad, exact_x.grad),
        "grad_weight": (weight.grad, exact_weight.grad),
    }


def _predicted(left: torch.Tensor, right: torch.Tensor, left_dim: int, right_dim: int) -> float:
    """The relative error of ``left @ right`` from rounding both, each element by a uniform error of its scale."""

    def variance(x, dim):
        return (x.abs().amax(dim, keepdim=True) / LARGEST).pow(2).expand_as(x) / 12

    noise = variance(left, left_dim) @ right.pow(2) + left.pow(2) @ variance(right, right_dim)
    return (noise.sum().sqrt() / (left @ right).norm()).item()


def test_errors_are_those_of_rounding():
    x, weight, grad = normal(4, 64, 96, seed=1), normal(128, 96, seed=2) / 10, normal(4, 64, 128, seed=3)
    x[0, 0] *= 3
    x, weight, grad = x.flatten(0, 1).double(), weight.double(), grad.flatten(0, 1).double()
    # The input's gradient meets the weight's scales before it is rounded.
    scale = weight.abs().amax(1) / LARGEST
    predicted = {
        "output": _predicted(x, weight.T, 1, 0),
        "grad_input": _predicted(grad * scale, weight / scale[:, None], 1, 1),
        "grad_weight": _predicted(grad.T, x, 1, 0),
    }
    for name, (ours, exact) in _linear(ALL).items():
        error = ((ours.double() - exact).norm() / exact.norm()).item()
        assert error == pytest.approx(predicted[name], rel=0.1), name
        # And no more than a few percent in any case.
        assert error < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exact", INT8_PRODUCTS)
def test_each_product_can_stay_as_it_was(exact, dtype):
    how = dataclasses.replace(ALL, in_8_bits=ALL.in_8_bits - {exact})
    tolerance = 1e-6 if dtype == torch.float32 else 5e-3
    for name, (ours, reference) in _linear(how, dtype).items():
        error = (ours.double() - reference).norm() / reference.norm()
        assert (error < tolerance) == (name == exact), name
        assert ours.dtype == (torch.float32 if name == "grad_weight" else dtype)


def test_parts_of_a_gradient_can_be_added_up_in_float32():
    parts, exactly = 4, dataclasses.replace(ALL, in_8_bits=frozenset(), layout=Layout(4))
    rounded = {}
    for name, dtype in {"compute": None, "float32": torch.float32}.items():
        found = _linear(dataclasses.replace(exactly, sum_dtype=dtype), torch.bfloat16)
        rounded[name] = found["grad_weight"][0]
        # The others are what they were.
        assert torch.equal(found["output"][0], _linear(exactly, torch.bfloat16)["output"][0])
    x, grad = normal(4, 64, 96, seed=1), normal(4, 64, 128, seed=3).bfloat16()
    x[0, 0] *= 3
    x = x.bfloat16().detach()
    products = torch.einsum("bto,bti->boi", grad.double(), x.double()).unflatten(0, (parts, -1)).sum(1)
    expected = products.bfloat16().float().sum(0)
    # Sums of 64 products in float32, rounded like exact ones but where those lie half-way.
    assert (rounded["float32"] - expected).norm() < 1e-3 * expected.norm()
    assert torch.equal(rounded["compute"], rounded["compute"].bfloat16().float())
    assert not torch.equal(rounded["float32"], rounded["float32"].bfloat16().float())


def test_stochastic_gradients_are_right_on_average():
    torch.manual_seed(0)
    how = dataclasses.replace(ALL, in_8_bits=frozenset({"grad_weight"}), stochastic=True)
    once, many = [], []
    for _ in range(64):
        ours, exact = _linear(how)["grad_weight"]
        once.append((ours.double() - exact).norm())
        many.append(ours.double())
    # The gradient's rounding averages out; the inputs' stays.
    assert (torch.stack(many).mean(0) - exact).norm() < 0.75 * torch.stack(once).mean()


def test_parts_of_a_batch_have_scales_of_their_own():
    grads = {}
    for parts in (1, 4):
        how = dataclasses.replace(ALL, layout=Layout(parts))
        ours, exact = _linear(how)["grad_weight"]
        grads[parts] = ((ours.double() - exact).norm() / exact.norm()).item()
    # The row with large values is one part's business then.
    assert grads[4] < grads[1]


def test_config():
    section = TrainSection(steps=1, batch_size=1, precision="int8")
    assert section.int8_products == list(INT8_PRODUCTS)
    with pytest.raises(ValueError, match="int8_products"):
        TrainSection(steps=1, batch_size=1, precision="int8", int8_products=[])
