"""The bounds, against numbers worked out by hand, enumeration, and what the TPU compiler said."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from gemma_xla.chips import CHIPS
from gemma_xla.errors import UserError
from gemma_xla.flops import FlopCounter
from gemma_xla.plan.arithmetic import advice, available, bounds
from gemma_xla.plan.dcn import dcn_collective, gradient_bytes
from gemma_xla.plan.step_time import executed_flops, int8_flops, step_time
from gemma_xla.sharding import MeshShape
from gemma_xla.temporaries import temporaries
from gemma_xla.train.build import empty_model, plan_shards, trained
from tests.plan.setups import LORA, a_config, a_setup

GIB = 2**30
# Gemma 2B.
D, F, L, N, H, V, T = 2048, 16384, 18, 8, 256, 256000, 8192
LAYER = D * (N * H + 2 * H) + N * H * D + 3 * D * F
NORMS = (2 * L + 1) * D
TRAIN = {"steps": 10, "batch_size_per_device": 1, "remat": "full", "layers": "scan", "loss_chunk": 512}


def test_what_programs_may_use():
    assert {name: round(available(CHIPS[name]) / GIB, 2) for name in ("v5e", "v5p", "v6e")} == {
        "v5e": 15.75,
        "v5p": 95.74,
        "v6e": 31.25,
    }


def test_arguments_are_within_a_hair_of_the_compilers():
    # Compiled for v5p-128, a row on each of 64 chips: arguments 471,058,944 bytes, temporaries 23,785,426,208.
    memory, _ = bounds(a_setup(topology="v5p-128"))
    arguments = memory.parameters + memory.optimizer + memory.batch
    assert arguments == 12 * ((L * LAYER + V * D) // 64 + NORMS) + 20 * T
    assert 471_058_944 - 100_000 < arguments <= 471_058_944
    assert memory.temporaries <= 23_785_426_208
    assert memory.used == arguments + memory.temporaries


def test_temporaries_by_hand():
    # What is kept: each layer's input, and the layers' weights side by side, in bfloat16.
    kept = L * T * D * 2 + L * LAYER // 256 * 2
    # The loss: 512 positions' logits and the gathered embedding in bfloat16, its gradient in float32.
    loss = 512 * V * 2 + V * D * 2 + V * D * 4
    # Attention: probabilities and their gradient; beside them the layers' gradients, in float32.
    attention = 2 * N * T * T * 2 + L * LAYER // 256 * 4
    assert temporaries(a_setup().step) == kept + max(loss, attention) == kept + loss
    assert temporaries(a_setup("train.loss_chunk=8192").step) == kept + 8192 * V * 2 + 2 * V * D * 2
    assert temporaries(a_setup(lora=LORA).step) > kept + 2 * N * T * T * 2
    # On one chip nothing is gathered.
    one = a_setup("model.overrides.num_hidden_layers=1", "data.seq_len=1024", topology="v5e-1")
    assert temporaries(one.step) == 1024 * D * 2 + LAYER * 2 + 512 * V * 2 + V * D * 4


def test_the_feed_forward_part_is_largest_where_rows_are_short():
    setup = a_setup("data.seq_len=256", "train.batch_size_per_device=128", "train.loss_chunk=1", topology="v5e-8")
    state = L * LAYER // 8
    kept = L * 128 * 256 * D * 2 + state * 2
    # Gate, up and the gradient of their product, one gathered matrix, and the gradients of the loop.
    assert temporaries(setup.step) == kept + 3 * 128 * 256 * F * 2 + D * F * 2 + state * 4


def test_without_rematerialisation_a_loop_keeps_what_matmuls_need():
    plain = temporaries(a_setup("train.remat=none").step)
    width = 2 * D + (2 * N + 2) * H + 2 * F
    loss = 512 * V * 2 + V * D * 6
    # Beside the loop's gradients in float32: one layer's probabilities and their gradient.
    backward = L * LAYER // 256 * 4 + 2 * N * T * T * 2
    # The compiled loop keeps what gate and up come to, with two factors, instead of these.
    assert plain == L * T * (width + F) * 2 + L * LAYER // 256 * 2 + max(loss, backward)
    # Unrolled, probabilities too are kept, the compiler may compute it again; expected is that it does not.
    unrolled = a_setup("train.remat=none", "train.layers=loop")
    assert temporaries(unrolled.step) == L * T * D * 2 + loss
    assert temporaries(unrolled.step, frugal=False) == L * T * (width + N * T) * 2 + loss
    # The input of o_proj is kept for its weight's gradient alone.
    loop = "train.remat=none", "train.layers=loop"
    lora = a_setup(*loop, lora=LORA), a_setup(*loop, lora={"rank": 16})
    few, all_ = (temporaries(setup.step, frugal=False) for setup in lora)
    assert all_ - few == L * T * N * H * 2


def test_the_end_of_the_step_holds_all_gradients_at_once():
    config = ("data.seq_len=64", "train.layers=loop", "train.loss_chunk=64", "model.overrides.vocab_size=512")
    setup = a_setup(*config, topology="v5e-1")
    assert temporaries(setup.step) == setup.memory.trained // 2
    free = a_setup(*config, "train.optimizer.clip_norm=0", topology="v5e-1")
    assert temporaries(free.step) < setup.memory.trained // 2


def test_micro_batches_keep_gradients():
    assert bounds(a_setup())[0].gradients == 0
    setup = a_setup("train.grad_accum=2")
    assert bounds(setup)[0].gradients == setup.memory.trained


def test_the_tensor_axis_splits_what_it_splits():
    memory, halved = bounds(a_setup())[0], bounds(a_setup("mesh.tensor=2"))[0]
    assert memory.batch == halved.batch
    kept = L * T * D * 2 + L * LAYER // 256 * 2
    assert halved.temporaries - kept == (memory.temporaries - kept) / 2


def test_executed_flops_by_hand():
    counter = FlopCounter(a_setup().model, T)
    forward = 2 * T * LAYER + 4 * N * H * T * T
    model = counter.per_sequence(causal=False)
    assert model == 3 * L * forward + 6 * T * V * D
    assert executed_flops(a_setup("train.remat=none", "train.layers=loop")) == model
    assert executed_flops(a_setup()) == model + L * (forward - 2 * T * D * F)
    # In a compiled loop the matrix products' results are kept, probabilities are not.
    assert executed_flops(a_setup("train.remat=none")) == model + L * 4 * N * H * T * T


def test_what_the_kernel_and_what_is_kept_save():
    keep = {"attention": 18, "gate_proj": 6}
    setup = a_setup("model.attention=auto", train=TRAIN | {"keep": keep})
    kept = L * T * (D + N * H + 2 * N) + 6 * T * F
    assert setup.step.kept == keep
    # No scores; the log-sum-exp takes two of bfloat16's places.
    assert temporaries(setup.step) == kept * 2 + L * LAYER // 256 * 2 + 512 * V * 2 + V * D * 6
    # The kernel leaves out half of the square; what is kept is not computed again.
    again = 2 * T * (LAYER - D * F) * L - 6 * 2 * T * D * F
    assert executed_flops(setup) == setup.flops.per_sequence(causal=True) + again


def test_products_in_8_bits_by_hand():
    plain, int8 = a_setup("train.grad_accum=2"), a_setup("train.grad_accum=2", train=TRAIN | {"precision": "int8"})
    products = 2 * T * (4 * LAYER - D * F) * L
    assert executed_flops(int8) == executed_flops(plain)
    assert int8_flops(plain) == 0
    assert int8_flops(int8) == products
    # Twice as fast, and half the bytes of the layers' weights, which are gathered twice.
    saved = 2 * products * (1 / 197e12 - 1 / 393e12)
    assert step_time(plain).compute - step_time(int8).compute == pytest.approx(saved)
    saved = 2 * 2 * L * LAYER * 255 / 256 / (4 * 45e9)
    assert step_time(plain).ici - step_time(int8).ici == pytest.approx(saved)
    some = a_setup(train=TRAIN | {"precision": "int8", "int8_products": ["output", "grad_weight"]})
    assert int8_flops(some) == products - 2 * T * LAYER * L


def test_lora_counts_no_gradient_below_the_first_adapter():
    setup = a_setup("train.remat=none", "train.layers=loop", lora=LORA)
    backward = 2 * T * LAYER + 2 * 4 * N * H * T * T
    assert setup.flops.per_sequence(causal=False) - executed_flops(setup) == pytest.approx(backward, rel=1e-12)


def test_the_time_by_hand():
    setup = a_setup("train.grad_accum=2", "train.remat=none", "train.layers=loop")
    time = step_time(setup)
    assert time.compute == pytest.approx(2 * executed_flops(setup) / 197e12)
    # Weights and two moments, four bytes each, read and written.
    assert time.optimizer == pytest.approx(24 * (setup.memory.trained / 4) / 819e9)
    weights = (L * LAYER + V * D) * 2 * 255 / 256
    scattered = ((L * LAYER + 2 * V * D) * 2 / 256 + NORMS * 4) * 255
    assert time.ici == pytest.approx(2 * (weights + scattered) / (4 * 45e9), rel=1e-6)
    assert bounds(setup)[1] == time.least == time.compute + time.optimizer
    assert time.most == time.compute + time.optimizer + time.ici


def test_what_hides_behind_what():
    time = dataclasses.replace(step_time(a_setup()), compute=3.0, optimizer=1.0, ici=2.0, dcn=0.5)
    assert (time.least, time.most) == (4.5, 6.5)
    assert dataclasses.replace(time, ici=7.0).least == 7.5
    assert dataclasses.replace(time, optimizer_waits=False).least == 3.5
    assert not step_time(a_setup("train.optimizer.clip_norm=0")).optimizer_waits


def test_sums_over_the_tensor_axis_travel():
    mesh = "mesh.fsdp=1", "mesh.tensor=8", "mesh.data=1"
    base = a_setup(*mesh, "train.remat=none", "train.layers=loop", topology="v5e-8")
    # Four sums per layer of [T, D] in bfloat16, each received twice but for the own eighth.
    assert step_time(base).ici == pytest.approx(4 * L * 2 * T * D * 2 * 7 / 8 / (4 * 45e9))


@pytest.mark.parametrize("lora", [None, LORA, {"rank": 4, "use_dora": True}])
@pytest.mark.parametrize("mesh", [MeshShape(fsdp=8), MeshShape(data=2, fsdp=2, tensor=2)])
def test_gradient_bytes_equal_those_of_all_parameters_one_by_one(lora, mesh):
    axes = [f"mesh.{axis}={size}" for axis, size in dataclasses.asdict(mesh).items()]
    setup = a_setup(*axes, topology="v5e-8", lora=lora)
    specs = plan_shards(setup.model, mesh, setup.config.lora)
    total = 0
    for name, parameter in trained(empty_model(setup.model, "sdpa", setup.config.lora)):
        share = parameter.numel() // math.prod(mesh.ways(entry) for entry in specs[name])
        total += share * (4 if parameter.dim() == 1 else 2) * (2 if "embed" in name else 1)
    assert gradient_bytes(setup) == total


def test_gradients_keep_their_dtype_in_float32():
    setup = a_setup("train.compute_dtype=float32")
    assert setup.compute_dtype == torch.float32
    assert gradient_bytes(setup) == setup.memory.trained + V * D * 4 // 256


def test_traffic_between_slices_by_hand():
    assert dcn_collective(a_setup()) is None
    setup = a_setup("mesh.data=4", "train.grad_accum=3", topology="4xv5e-256")
    found = dcn_collective(setup)
    assert (found.kind, found.axis, found.count, found.overlaps) == ("all-reduce", "dcn", 3, False)
    assert found.num_bytes == 3 * ((L * LAYER + 2 * V * D) // 256 * 2 + NORMS * 4)
    assert found.seconds == pytest.approx(2 * 3 / 4 * found.num_bytes / CHIPS["v5e"].dcn_bandwidth.value)
    assert bounds(setup)[1] == pytest.approx(bounds(a_setup("train.grad_accum=3"))[1] + found.seconds)
    # Adapters alone.
    small = dcn_collective(a_setup("mesh.data=4", topology="4xv5e-256", lora=LORA))
    assert small.num_bytes == a_setup(lora=LORA).memory.trained // 2


def test_advice_names_what_suffices_and_predicts_what_it_would_take():
    setup = a_setup("train.remat=none", "train.layers=loop", "train.batch_size_per_device=4")
    lines = advice(setup, bounds(setup)[0])
    assert lines[0].startswith("train.remat=full: about ")
    assert "fits" in lines[0]
    changed, _ = bounds(a_setup("train.layers=loop", "train.batch_size_per_device=4"))
    assert f"about {changed.used / GIB:.2f} of 15.75 GiB" in lines[0]
    # A quarter of the rows does not suffice, so it is not there.
    assert not any(line.startswith("train.batch_size_per_device") for line in lines)


def test_advice_keeps_the_rows_of_a_step():
    setup = a_setup("data.seq_len=2048", "train.batch_size_per_device=64", topology="v5e-8", lora=LORA)
    lines = advice(setup, bounds(setup)[0])
    assert any(line.startswith("train.batch_size_per_device=32, train.grad_accum=2: ") for line in lines)
    assert any(
        line.startswith("hardware.topology=v5e-16, mesh.fsdp=16, train.batch_size_per_device=32") for line in lines
    )
    assert not any("rows per step instead" in line for line in lines)


def test_advice_scales_with_what_the_compiler_found():
    setup = a_setup("train.batch_size_per_device=8", topology="v5e-8")
    floor, _ = bounds(setup)
    compiled = dataclasses.replace(floor, temporaries=2 * floor.temporaries, used=floor.used + floor.temporaries)
    line = next(line for line in advice(setup, compiled) if line.startswith("train.batch_size_per_device"))
    rows = int(line.partition("=")[2].partition(",")[0])
    changed, _ = bounds(
        a_setup(f"train.batch_size_per_device={rows}", f"train.grad_accum={8 // rows}", topology="v5e-8")
    )
    assert f"about {(changed.used + changed.temporaries) / GIB:.2f} of" in line


def test_advice_puts_changes_together_where_none_suffices_alone():
    setup = a_setup("train.remat=none", "train.layers=loop", "train.batch_size_per_device=32")
    lines = advice(setup, bounds(setup)[0])
    assert "train.remat=full" in lines[0]
    assert "train.batch_size_per_device=" in lines[0]
    assert "train.grad_accum=" in lines[0]


def test_advice_on_what_cannot_fit_says_what_helps():
    setup = a_setup("model.preset=gemma-7b", topology="v5e-1")
    lines = advice(setup, bounds(setup)[0])
    assert lines[0].startswith("hardware.topology=v5e-8, mesh.fsdp=8: ")
    assert all("GiB too much" in line for line in lines)


def test_a_split_that_no_run_allows_is_never_advised():
    # Several hosts: the tensor axis must be 1.
    setup = a_setup("train.batch_size_per_device=16")
    assert not any("mesh.tensor" in line for line in advice(setup, bounds(setup)[0]))


def test_a_mesh_that_does_not_suit_the_model_is_an_error():
    with pytest.raises(UserError, match="mesh.tensor is 16"):
        bounds(a_setup("mesh.tensor=16", topology="v5e-16"))


def test_bounds_fall_when_less_is_asked_for():
    pairs = [
        ("train.batch_size_per_device=2", "train.batch_size_per_device=1"),
        ("train.remat=none", "train.remat=full"),
        ("train.loss_chunk=1024", "train.loss_chunk=512"),
        ("train.layers=scan", "train.layers=loop"),
        ("data.seq_len=8192", "data.seq_len=4096"),
    ]
    for more, less in pairs:
        assert bounds(a_setup(more))[0].used > bounds(a_setup(less))[0].used
    assert a_config().train.loss_chunk == 512
