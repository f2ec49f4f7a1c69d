"""Adapters beside those of peft on transformers' Gemma: outputs, gradients, updates, and what each keeps in memory."""

from __future__ import annotations

import copy

import peft
import pytest
import torch

from gemma_xla.backend import Backend
from gemma_xla.config import LoraSection, OptimizerSection, TrainSection
from gemma_xla.errors import UserError
from gemma_xla.flops import FlopCounter, num_parameters
from gemma_xla.model.config import LORA_TARGETS, preset
from gemma_xla.model.lora import check_lora, is_adapter
from gemma_xla.sharding import MeshShape
from gemma_xla.train.build import adapted, build_model, trained
from gemma_xla.train.memory import memory
from gemma_xla.train.optimizer import build_optimizer
from gemma_xla.train.parallelize import parallelize
from gemma_xla.train.step import TrainStep, summed_loss
from tests.hf.conftest import Weights
from tests.reference import SHAPES, assert_close, ours_from, reference_model
from tests.reference import summed_loss as reference_loss
from tests.worker import batch

CPU = Backend(torch.device("cpu"))
KINDS = {
    "plain": LoraSection(rank=4, alpha=8.0),
    "some modules": LoraSection(rank=2, target_modules=["q_proj", "v_proj", "down_proj"]),
    "rslora": LoraSection(rank=4, alpha=3.0, use_rslora=True),
    "dora": LoraSection(rank=4, alpha=8.0, use_dora=True),
}
CONFIG = SHAPES["gqa-16"]
RATES = [1e-2, 2e-2]


def build(theirs, lora: LoraSection, adapters: dict[str, torch.Tensor] | None = None, dtype=torch.float32):
    weights = Weights(ours_from(theirs, CONFIG, "sdpa").state_dict())
    made = adapters and (lambda name, *_: adapters[name].clone())
    return build_model(CONFIG, CPU, adapted(weights, CPU, 0, made), "sdpa", lora, dtype)


def with_peft(theirs, lora: LoraSection):
    """transformers' Gemma with peft's adapters, of values that change its output."""
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
    )
    model = peft.get_peft_model(copy.deepcopy(theirs), config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.3, generator=generator)
            elif "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
    return model


def ours_by_name(model) -> dict[str, torch.nn.Parameter]:
    """peft's adapters under our names."""
    found = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            name = name.removeprefix("base_model.model.").replace(".default", "")
            found[name.replace("magnitude_vector.weight", "magnitude_vector")] = parameter
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_changes_nothing(kind):
    theirs = reference_model(CONFIG)
    model, _ = build(theirs, KINDS[kind])
    ids = batch(0, CONFIG)["input_ids"]
    assert_close(model(ids), ours_from(theirs, CONFIG, "sdpa")(ids), "logits", tolerance=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_peft(kind):
    reference = with_peft(reference_model(CONFIG), KINDS[kind])
    theirs = ours_by_name(reference)
    model, _ = build(reference_model(CONFIG), KINDS[kind], {n: p.detach() for n, p in theirs.items()})
    assert {name for name, _ in trained(model)} == theirs.keys()
    ids, labels = torch.randint(0, CONFIG.vocab_size, (3, 20)), torch.randint(0, CONFIG.vocab_size, (3, 20))
    expected = reference(ids).logits
    assert_close(model(ids), expected, "logits", tolerance=1e-5)
    reference_loss(expected, labels).backward()
    model(ids, shift_labels=labels).backward()
    for name, parameter in trained(model):
        assert_close(parameter.grad, theirs[name].grad, name, tolerance=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("remat", ["none", "full"])
def test_steps_are_those_of_peft(kind, remat):
    reference = with_peft(reference_model(CONFIG), KINDS[kind])
    theirs = ours_by_name(reference)
    model, specs = build(reference_model(CONFIG), KINDS[kind], {n: p.detach() for n, p in theirs.items()})
    frozen = {name: p.clone() for name, p in model.named_parameters() if not is_adapter(name)}
    # A large epsilon: of a tiny gradient, Adam keeps only the sign, which rounding decides.
    section = OptimizerSection(weight_decay=0.1, eps=1e-2)
    step = TrainStep(model, build_optimizer(model, specs, CPU, section), CPU, clip_norm=0.5, loss_chunk=7)
    parallelize(model, specs, CPU, TrainSection(steps=1, batch_size=1, remat=remat), torch.float32)
    groups = [
        {"params": [p for p in theirs.values() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in theirs.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-2)
    for rate in RATES:
        ids, labels = torch.randint(0, CONFIG.vocab_size, (3, 20)), torch.randint(0, CONFIG.vocab_size, (3, 20))
        whole = {"input_ids": ids, "shift_labels": labels, "segment_ids": torch.ones(3, 20, dtype=torch.int32)}
        loss, norm, *_ = step([whole], rate).tolist()
        expected = reference_loss(reference(ids).logits, labels) / labels.numel()
        expected.backward()
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        assert norm == pytest.approx(torch.nn.utils.clip_grad_norm_(theirs.values(), 0.5).item(), rel=1e-5)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in trained(model):
        assert_close(parameter, theirs[name], name, tolerance=1e-5)
    for name, parameter in frozen.items():
        assert torch.equal(model.get_parameter(name), parameter) and model.get_parameter(name).grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_base_in_8_bits(kind):
    """The base's part of the result and of the gradients is rounded, the adapter's own is not."""
    results = {}
    for precision in ("default", "int8"):
        torch.manual_seed(0)
        model, specs = build(reference_model(CONFIG), KINDS[kind])
        section = TrainSection(steps=1, batch_size=1, precision=precision)
        parallelize(model, specs, CPU, section, torch.float32)
        summed_loss(model, batch(0, CONFIG), CPU, 16)[0].backward()
        results[precision] = {name: p.grad for name, p in trained(model)}
        assert all(p.grad is None for name, p in model.named_parameters() if name not in results[precision])
    for name, exact in results["default"].items():
        error = (results["int8"][name] - exact).norm() / exact.norm().clamp(min=1e-30)
        assert error < 0.1, name
        if name.endswith("lora_B.weight"):
            assert error > 1e-6, name


def test_dropout_is_that_of_peft_while_training_and_off_otherwise():
    lora = LoraSection(rank=4, dropout=0.5, use_dora=True, target_modules=["q_proj"])
    reference = with_peft(reference_model(CONFIG), lora).train()
    theirs = ours_by_name(reference)
    model, _ = build(reference_model(CONFIG), lora, {n: p.detach() for n, p in theirs.items()})
    ids = torch.randint(0, CONFIG.vocab_size, (2, 9))
    torch.manual_seed(1)
    expected = reference(ids).logits
    torch.manual_seed(1)
    # One module per layer draws: the same numbers.
    assert_close(model.train()(ids), expected, "training", tolerance=1e-5)
    assert_close(model.eval()(ids), reference.eval()(ids).logits, "evaluation", tolerance=1e-5)


def test_frozen_weights_are_kept_in_the_compute_dtype_and_adapters_in_float32():
    model, specs = build(reference_model(CONFIG), KINDS["dora"], dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        wide = is_adapter(name) or parameter.dim() == 1
        assert parameter.dtype == (torch.float32 if wide else torch.bfloat16), name
        assert parameter.requires_grad == is_adapter(name), name
    optimizer = build_optimizer(model, specs, CPU, OptimizerSection())
    assert len(optimizer.state) == len(list(trained(model)))
    parallelize(model, specs, CPU, TrainSection(steps=1, batch_size=1), torch.bfloat16)
    summed_loss(model, batch(0, CONFIG), CPU, 16)[0].backward()
    held = {True: 0, False: 0}
    for parameter in model.parameters():
        held[parameter.requires_grad] += parameter.untyped_storage().nbytes()
    expected = memory(CONFIG, MeshShape(), KINDS["dora"], torch.bfloat16)
    assert (expected.frozen, expected.trained) == (held[False], held[True])
    gradients = sum(p.grad.untyped_storage().nbytes() for _, p in trained(model))
    moments = sum(s[m].untyped_storage().nbytes() for s in optimizer.state.values() for m in ("exp_avg", "exp_avg_sq"))
    assert expected.total == sum(held.values()) + gradients + moments


@pytest.mark.parametrize(("name", "devices"), [("gemma-2b", 8), ("gemma-7b", 256)])
def test_memory_is_shared_out_over_the_mesh(name, devices):
    config, lora = preset(name), LoraSection(rank=16)
    counter = FlopCounter(config, 8192, 16)
    alone, shared = (memory(config, MeshShape(fsdp=n), lora, torch.bfloat16) for n in (1, devices))
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    assert alone.frozen == 2 * (num_parameters(config) - norms) + 4 * norms
    assert alone.trained == 4 * counter.num_trainable_parameters
    assert shared.frozen == 2 * (num_parameters(config) - norms) // devices + 4 * norms
    assert shared.trained == alone.trained // devices
    full = memory(config, MeshShape(fsdp=devices))
    assert full.frozen == 0 and full.total == 16 * ((num_parameters(config) - norms) // devices + norms)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"target_modules": ["qproj"]},
            "lora.target_modules: no module is called 'qproj' (did you mean 'q_proj'?); there are",
        ),
        ({"target_modules": ["lm_head"]}, f"there are {', '.join(LORA_TARGETS)}"),
        ({"rank": 300}, "lora.rank is 300, but k_proj is a matrix of 32 x 48; choose at most 32"),
    ],
)
def test_impossible_adapters_are_refused(changes, message):
    with pytest.raises(UserError) as error:
        check_lora(LoraSection(**changes), CONFIG)
    assert message in str(error.value)
