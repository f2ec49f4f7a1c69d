"""The whole model against `transformers`: outputs and gradients, in float32 and bfloat16; names, sizes, start."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
import transformers

from gemma_xla.model.config import PRESETS
from gemma_xla.model.gemma import Gemma, init_parameter
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
    reference_config,
    reference_model,
    summed_loss,
)

GQA = SHAPES["gqa-16"]
every_impl = pytest.mark.parametrize("impl", IMPLS)


@pytest.mark.parametrize("shape", SHAPES)
@every_impl
def test_logits_loss_and_all_gradients(shape, impl):
    ours, theirs = pair(SHAPES[shape], impl)
    ids, labels = random_ids(GQA, 2, 13), random_ids(GQA, 2, 13, seed=1)
    labels[0, :4] = -100
    logits = theirs(ids).logits
    assert_close(ours(ids), logits, "logits")
    loss, expected = ours(ids, shift_labels=labels, loss_chunk=5), summed_loss(logits, labels)
    assert_close(loss, expected, "loss")
    expected = gradients(theirs, expected)
    assert_gradients_close(gradients(ours, loss), expected)
    assert_gradients_close(gradients(ours, summed_loss(ours(ids), labels)), expected)


def float64_copy(reference: transformers.GemmaForCausalLM) -> transformers.GemmaForCausalLM:
    """The same, already rounded, weights in float64; the embedding's factor is not rounded."""
    exact = cast_reference(copy.deepcopy(reference), torch.float64)
    exact.model.embed_tokens.embed_scale = torch.tensor(exact.config.hidden_size**0.5, dtype=torch.float64)
    return exact


def errors(logits, grads, exact_logits, exact_grads) -> torch.Tensor:
    """Mean and largest error of logits and of gradients, each gradient relative to its largest entry."""
    forward = (logits - exact_logits).abs()
    backward = torch.cat([((grads[k] - g).abs() / g.abs().max()).flatten() for k, g in exact_grads.items()])
    return torch.stack([forward.mean(), forward.max(), backward.mean(), backward.max()]).detach()


# One run's largest error is a matter of luck (0.8 to 1.3 times another's), so each figure is the mean of eight.
@pytest.mark.parametrize("shape", ["mqa-256", "gqa-16", "mha-16"])
def test_bfloat16_is_as_exact_as_the_reference_in_bfloat16(shape):
    config, total = SHAPES[shape], {"theirs": 0.0, **dict.fromkeys(IMPLS, 0.0)}
    for seed in range(8):
        theirs = cast_reference(reference_model(config, seed), torch.bfloat16)
        ids, labels = (random_ids(config, 2, 32, seed=s) for s in (seed, seed + 100))
        exact = float64_copy(theirs)
        exact_logits = exact(ids).logits
        truth = exact_logits, gradients(exact, summed_loss(exact_logits, labels))
        logits = theirs(ids).logits
        total["theirs"] += errors(logits, gradients(theirs, summed_loss(logits, labels)), *truth)
        for impl in IMPLS:
            ours = ours_from(theirs, config, impl)
            logits = ours(ids)
            assert logits.dtype == torch.bfloat16
            grads = gradients(ours, ours(ids, shift_labels=labels, loss_chunk=10))
            total[impl] += errors(logits, grads, *truth)
    for impl in IMPLS:
        ratios = total[impl] / total["theirs"]
        assert (ratios <= 1.1).all(), f"{impl}: {ratios.tolist()}"


def on_meta(config):
    with torch.device("meta"):
        return Gemma(config), transformers.GemmaForCausalLM(reference_config(config))


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_names_shapes_and_count_are_those_of_the_reference(name):
    ours, theirs = on_meta(PRESETS[name])
    expected = {k: v.shape for k, v in theirs.state_dict().items() if k != "lm_head.weight"}
    assert {k: v.shape for k, v in ours.state_dict().items()} == expected
    assert {k: v.shape for k, v in ours.named_parameters()} == expected
    assert sum(p.numel() for p in ours.parameters()) == theirs.num_parameters()


# Gemma: Open Models Based on Gemini Research and Technology, arXiv:2403.08295, table 2.
@pytest.mark.parametrize(("name", "non_embedding"), [("gemma-2b", 1_981_884_416), ("gemma-7b", 7_751_248_896)])
def test_published_parameter_count(name, non_embedding):
    ours, _ = on_meta(PRESETS[name])
    sizes = {k: p.numel() for k, p in ours.named_parameters()}
    assert sizes.pop("model.embed_tokens.weight") == 256000 * PRESETS[name].hidden_size
    assert sum(sizes.values()) == non_embedding


def filled(config, seed: int, reverse: bool = False) -> dict[str, torch.Tensor]:
    parameters = dict(Gemma(config).named_parameters())
    for name in sorted(parameters, reverse=reverse):
        init_parameter(name, parameters[name], config, seed)
    return parameters


def test_init_depends_on_seed_and_name_alone():
    first, again, other = filled(GQA, 0), filled(GQA, 0, reverse=True), filled(GQA, 1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    matrices = [name for name in first if first[name].dim() == 2]
    assert not any(torch.equal(first[name], other[name]) for name in matrices)
    same_shape = [first[name] for name in matrices if name.endswith(("gate_proj.weight", "up_proj.weight"))]
    assert len(same_shape) == 4
    assert not any(torch.equal(a, b) for i, a in enumerate(same_shape) for b in same_shape[:i])


def test_init_is_the_same_in_every_process():
    code = (
        "import torch; from gemma_xla.model.gemma import GemmaConfig, init_parameter; p = torch.empty(3, 3);"
        "init_parameter('a.weight', p, GemmaConfig(), 5); print(p.tolist())"
    )
    parameter = torch.empty(3, 3)
    init_parameter("a.weight", parameter, GQA, 5)
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == str(parameter.tolist()), run.stderr


@pytest.mark.parametrize("initializer_range", [0.02, 0.5])
def test_init_distribution(initializer_range):
    config = PRESETS["gemma-test"].replace(initializer_range=initializer_range)
    for name, parameter in filled(config, 0).items():
        if parameter.dim() == 1:
            assert not parameter.any(), name
            continue
        # Five standard errors.
        slack = 5 * parameter.numel() ** -0.5 * initializer_range
        assert parameter.std().item() == pytest.approx(initializer_range, abs=slack), name
        assert parameter.mean().item() == pytest.approx(0.0, abs=slack), name
        assert parameter.abs().max() < 6 * initializer_range, name


def shared_2b():
    """Gemma 2B twice over the same 10 GB of weights, filled from one block of random numbers."""
    config = PRESETS["gemma-2b"]
    ours, theirs = on_meta(config)
    block = torch.randn(4_000_037, generator=torch.Generator().manual_seed(0))
    state = {}
    for name, parameter in ours.named_parameters():
        scale = 0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
        values = torch.empty(parameter.numel())
        for start in range(0, len(values), len(block)):
            part = values[start : start + len(block)]
            torch.mul(block[: len(part)], scale, out=part)
        state[name] = values.view(parameter.shape)
    ours.load_state_dict(state, assign=True)
    theirs.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]}, assign=True)
    # Buffers are not part of a state dict.
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)
    theirs.model.embed_tokens.embed_scale = torch.tensor(config.hidden_size**0.5)
    return ours, theirs


@pytest.mark.slow
@torch.no_grad()
def test_gemma_2b_at_full_size():
    ours, theirs = shared_2b()
    ids = random_ids(ours.config, 1, 16)
    expected = theirs(ids).logits
    assert expected.std() > 0.1
    assert_close(ours(ids), expected)
