"""The step against transformers with a plain PyTorch loop, and against itself with other micro-batches."""

from __future__ import annotations

import pytest
import torch

from gemma_xla.backend import Backend
from gemma_xla.config import OptimizerSection, TrainSection
from gemma_xla.model.config import preset
from gemma_xla.train.build import build_model, initial
from gemma_xla.train.optimizer import build_optimizer
from gemma_xla.train.parallelize import parallelize
from gemma_xla.train.step import TrainStep
from tests.reference import assert_close, reference_model, summed_loss
from tests.worker import batch, run

CONFIG = preset("gemma-test")
RATES = [1e-3 * (step + 1) for step in range(10)]


def _ours(reference):
    backend = Backend(torch.device("cpu"))
    weights = reference.state_dict()
    model, specs = build_model(CONFIG, backend, lambda name, *_: weights[name].clone(), "sdpa")
    optimizer = build_optimizer(model, specs, backend, OptimizerSection(weight_decay=0.1))
    parallelize(model, specs, backend, TrainSection(steps=1, batch_size=1), torch.float32)
    return model, TrainStep(model, optimizer, backend, clip_norm=0.5, loss_chunk=7)


def _reference_step(model, optimizer, rate):
    """One step on each document by itself, as transformers would see it without packing."""

    def step(whole):
        total, tokens = 0.0, 0
        for row in range(len(whole["input_ids"])):
            for segment in (1, 2):
                inside = whole["segment_ids"][row] == segment
                if inside.any():
                    ids = whole["input_ids"][row][inside][None].long()
                    labels = whole["shift_labels"][row][inside][None]
                    total = total + summed_loss(model(ids).logits, labels)
                    tokens += labels.numel()
        loss = total / tokens
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        return loss.item(), norm.item(), tokens

    return step


def test_ten_packed_steps_equal_transformers_on_single_documents():
    reference = reference_model(CONFIG)
    model, step = _ours(reference)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in reference.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in reference.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    for number, rate in enumerate(RATES):
        whole = batch(number, CONFIG)
        loss, norm, tokens, real = step([whole], rate).tolist()
        expected = _reference_step(reference, optimizer, rate)(whole)
        assert tokens == real == expected[2]
        assert loss == pytest.approx(expected[0], rel=1e-5)
        assert norm == pytest.approx(expected[1], rel=1e-4)
    theirs = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        # Adam divides by the root of the second moment: rounding of tiny gradients grows to a part of the step.
        assert_close(parameter, theirs[name], name, tolerance=1e-3)


@pytest.mark.parametrize("grad_accum", [2, 4, 8])
def test_micro_batches_add_up_to_the_large_batch(grad_accum):
    """Rows have from 12 to 31 real tokens: a mean of means would differ."""
    whole, parts = run({"steps": 5}), run({"steps": 5, "grad_accum": grad_accum})
    assert parts["tokens"] == whole["tokens"]
    assert parts["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    assert parts["grad_norms"] == pytest.approx(whole["grad_norms"], rel=1e-5)


def test_rematerialisation_changes_no_bit():
    plain, remat = run({"steps": 3}), run({"steps": 3, "remat": "full"})
    assert remat == plain


def test_clipping_limits_the_update_and_reports_the_norm_before():
    free, clipped = run({"steps": 1, "clip_norm": 0.0}), run({"steps": 1, "clip_norm": 0.01})
    assert clipped["grad_norms"] == free["grad_norms"]
    # Adam's first step has the same length whatever the gradient's scale, but epsilon tells them apart.
    assert clipped["weights"] != free["weights"]


def test_bfloat16_compute_follows_float32():
    exact, rounded = run({"steps": 4}), run({"steps": 4, "dtype": "bfloat16"})
    assert rounded["losses"] != exact["losses"]
    assert rounded["losses"] == pytest.approx(exact["losses"], rel=5e-3)


def test_parameters_stay_float32_under_bfloat16_compute():
    backend = Backend(torch.device("cpu"))
    model, specs = build_model(CONFIG, backend, initial(CONFIG, backend, 0), "sdpa")
    optimizer = build_optimizer(model, specs, backend, OptimizerSection())
    parallelize(model, specs, backend, TrainSection(steps=1, batch_size=1), torch.bfloat16)
    seen = []
    model.model.layers[0].mlp.register_forward_hook(lambda _m, _a, out: seen.append(out.dtype))
    TrainStep(model, optimizer, backend, clip_norm=1.0, loss_chunk=16)([batch(0, CONFIG)], 1e-3)
    assert seen == [torch.bfloat16]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(isinstance(p, torch.nn.Parameter) for p in model.parameters())
