"""What is kept of a layer takes the place of what is computed again, and changes no number."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gemma_xla.model.kept import Kept, Noting, Replaying, kept, using


def layer(x: torch.Tensor, weight: torch.Tensor, calls: list[str]) -> torch.Tensor:
    """A product, a random choice, and something that counts how often it is computed."""
    h = kept().replace("product", x @ weight)
    h = kept().dropout(torch.tanh(h), 0.5)

    def compute():
        calls.append("computed")
        return h.detach().sum(), h.detach().mean()

    total, mean = kept().compute("sums", compute)
    return h * total + mean


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 8, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2)]


@pytest.mark.parametrize("names", [(), ("product",), ("sums",), ("product", "sums")])
def test_a_layer_run_again_gives_the_same_output_and_gradients(inputs, names):
    noted, calls = Noting(frozenset(names)), []
    with using(noted):
        first = layer(*inputs, calls)
    expected = torch.autograd.grad(first.sum(), inputs)
    # A loop collects values alone.
    values = {name: [tensor.detach() for tensor in tensors] for name, tensors in noted.values.items()}
    with using(Replaying(values)):
        again = layer(*inputs, calls)
    assert torch.equal(again, first)
    assert calls == ["computed"] * (1 if "sums" in names else 2)
    for found, wanted in zip(torch.autograd.grad(again.sum(), inputs), expected, strict=True):
        assert torch.equal(found, wanted)
    assert {name for name in noted.values if not name.startswith("dropout")} == set(names)


def test_what_was_kept_is_what_is_used(inputs):
    noted = Noting(frozenset({"product"}))
    with using(noted):
        layer(*inputs, [])
    (value,) = noted.values["product"]
    noted.values["product"] = [torch.zeros_like(value)]
    with using(Replaying(noted.values)):
        assert not layer(*inputs, []).any()


def test_dropout_keeps_the_mean_and_drops_its_share():
    x, noted = torch.ones(400, 400), Noting(frozenset())
    dropped = noted.dropout(x, 0.25)
    assert dropped.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    assert dropped.mean().item() == pytest.approx(1, abs=0.01)


def test_outside_a_loop_nothing_is_kept():
    torch.manual_seed(0)
    expected = F.dropout(torch.ones(9), 0.5)
    torch.manual_seed(0)
    assert type(kept()) is Kept
    assert torch.equal(kept().dropout(torch.ones(9), 0.5), expected)


def test_it_is_put_back_after_an_error():
    with pytest.raises(KeyError), using(Noting(frozenset())):
        raise KeyError
    assert type(kept()) is Kept
