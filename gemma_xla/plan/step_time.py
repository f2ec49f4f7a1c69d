"""The time that a step takes at the very least: no compiler can make it less."""

from __future__ import annotations

from dataclasses import dataclass

from gemma_xla.flops import projections
from gemma_xla.plan.dcn import dcn_collective, gradient_bytes
from gemma_xla.plan.setup import Setup
from gemma_xla.temporaries import layer_parameters, not_again, outer_parameters


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step with nothing lost.

    Attributes:
        compute: all matmuls at the chip's peak.
        optimizer: reading and writing weights and moments at the memory's full speed.
        ici: what chips of a slice send each other, over all of a chip's links at once.
        dcn: what slices send each other.
        optimizer_waits: whether the update cannot begin before the last gradient is there.
    """

    compute: float
    optimizer: float
    ici: float
    dcn: float
    optimizer_waits: bool

    @property
    def least(self) -> float:
        """With whatever can overlap hidden."""
        busy = self.compute + self.optimizer if self.optimizer_waits else max(self.compute, self.optimizer)
        return max(busy, self.ici) + self.dcn

    @property
    def most(self) -> float:
        """With nothing hidden."""
        return self.compute + self.optimizer + self.ici + self.dcn


def step_time(setup: Setup) -> StepTime:
    """Return the parts of the bound of a step's time."""
    chip, dcn = setup.hardware.chip, dcn_collective(setup)
    trained = setup.memory.trained
    all_flops, int8 = executed_flops(setup), int8_flops(setup)
    chip_seconds = (all_flops - int8) / chip.peak_flops.value + int8 / chip.peak_int8.value
    return StepTime(
        compute=setup.rows * chip_seconds / setup.hardware.num_chips,
        # Weights and moments, read and written.
        optimizer=2 * 3 * trained / chip.hbm_bandwidth.value,
        ici=_ici_bytes(setup) / (chip.num_links.value * chip.link_bandwidth.value),
        dcn=dcn.seconds if dcn else 0.0,
        # Clipping needs the norm of all gradients.
        optimizer_waits=setup.config.train.optimizer.clip_norm > 0,
    )


def executed_flops(setup: Setup) -> float:
    """FLOPs that a sequence takes, at least: unlike model FLOPs, with what is computed twice or for nothing.

    Attention computes the whole square of scores, the kernel half of it. With ``remat=full``, or in a compiled loop,
    the layers' forward pass runs twice, but for what is kept and for `down_proj`, whose output the backward pass does
    not need. Of attention its output alone helps the kernel alone. With LoRA nothing below the first layer's adapters
    needs a gradient, so that layer's backward pass is not counted.
    """
    causal, num_layers = setup.uses_splash, setup.model.num_hidden_layers
    terms = {term.name: term for term in setup.flops.terms(causal)}
    total = setup.flops.per_sequence(causal=causal)
    layers = [terms[name] for name in (*projections(setup.model), "attention")]
    if setup.config.lora:
        total -= sum(term.training - term.forward for term in layers) / num_layers
    if computes_twice(setup):
        kept = not_again(setup.step)
        if not setup.uses_splash:
            kept.pop("attention", None)
        total += sum(term.forward * (1 - kept.get(term.name, 0) / num_layers) for term in layers)
    return total


def int8_flops(setup: Setup) -> float:
    """Those of `executed_flops` that are in 8 bits."""
    train, num_layers = setup.config.train, setup.model.num_hidden_layers
    if train.precision != "int8":
        return 0.0
    terms = [term for term in setup.flops.terms() if term.name in projections(setup.model)]
    kept = not_again(setup.step)
    total = 0.0
    for term in terms:
        again = 1 - kept.get(term.name, 0) / num_layers if computes_twice(setup) else 0
        parts = {"output": term.forward * (1 + again), "grad_input": term.forward, "grad_weight": term.forward}
        if setup.config.lora:
            parts |= {"grad_input": term.forward * (num_layers - 1) / num_layers, "grad_weight": 0}
        total += sum(parts[name] for name in train.int8_products)
    return total


def computes_twice(setup: Setup) -> bool:
    """Whether the backward pass runs the layers' forward pass again, in part at least."""
    return setup.config.train.remat == "full" or setup.config.train.layers == "scan"


def _ici_bytes(setup: Setup) -> float:
    """Bytes that a chip receives from others in a step, at least.

    Weights gathered over fsdp, those of layers for each forward pass; gradients scattered over it and summed over data;
    and, over tensor, the sums of what attention and the feed-forward part give, and of their inputs' gradients. With
    rematerialisation weights and attention's sum are needed again, but for what is kept. With LoRA the first layer's
    gradients are not counted.
    """
    section, mesh, layers = setup.config.train, setup.hardware.slice_mesh, setup.model.num_hidden_layers
    remat = computes_twice(setup)
    # Of whole weights as they are used; each chip has its part already.
    weights = (2 if remat else 1) * layers * layer_parameters(setup.step) * _weight_bytes(setup)
    gathered = (outer_parameters(setup.step) * setup.step.itemsize + weights) * (mesh.fsdp - 1) / mesh.fsdp
    part = gradient_bytes(setup)
    scattered = part * (mesh.fsdp - 1) + _all_reduced(part, mesh.data)
    sums = layers * (3 if remat else 2) - setup.step.kept.get("o_proj", 0) + 2 * (layers - bool(setup.config.lora))
    summed = sums * _all_reduced(setup.step.positions * setup.model.hidden_size * setup.step.itemsize, mesh.tensor)
    return section.grad_accum * (gathered + scattered + summed)


def _weight_bytes(setup: Setup) -> int:
    """Bytes in which an element of a layer's weights is sent to where it is used."""
    used = {"output", "grad_input"}
    in_8_bits = used & set(setup.config.train.int8_products) if setup.config.train.precision == "int8" else set()
    return bool(in_8_bits) + setup.step.itemsize * bool(used - in_8_bits)


def _all_reduced(num_bytes: int, ways: int) -> float:
    """What each chip receives when all add up a tensor that each of them has."""
    return 2 * num_bytes * (ways - 1) / ways
