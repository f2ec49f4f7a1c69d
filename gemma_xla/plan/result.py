"""What a plan says, as plain data. Times are seconds, sizes are bytes, speeds are per second."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Collective:
    """All transfers between chips of one kind, along one axis, in one part of the step.

    Attributes:
        kind: all-gather, all-reduce, reduce-scatter, all-to-all or collective-permute.
        axis: the mesh axes they run along, such as "fsdp" or "data+fsdp"; "dcn" between slices.
        count: how often in a step.
        num_bytes: of the whole tensor (gathered or to be reduced), all of them together.
        seconds: at the links' nominal speed.
        overlaps: whether the compiler lets them run beside computation.
    """

    kind: str
    axis: str
    count: int
    num_bytes: int
    seconds: float
    overlaps: bool


@dataclass(frozen=True)
class Matmul:
    """One product of the compiled step, with whatever is fused into it, summed over the loop it is in."""

    name: str
    # Of the fusion's result, in HLO's notation.
    shape: str
    count: int
    seconds: float
    # At the chip's peak.
    ideal_seconds: float
    # What it comes from, as far as the compiler tells.
    source: str


@dataclass(frozen=True)
class Estimate:
    """How long one graph takes.

    Attributes:
        seconds: with whatever overlaps hidden.
        upper_bound_seconds: with nothing hidden.
        parts: seconds of "matmuls", "attention", "other" and "collectives" (those that do not overlap); they sum to
            ``seconds`` unless collectives that overlap take longer than everything they could hide behind, which
            "waiting" then names.
        collectives: by kind and axis.
        matmuls: all, those that lose most against their ideal first.
        unpriced: operations that the estimate leaves out, as "name: times".
    """

    seconds: float
    upper_bound_seconds: float
    parts: dict[str, float]
    collectives: list[Collective] = field(default_factory=list)
    matmuls: list[Matmul] = field(default_factory=list)
    unpriced: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Buffer:
    """One of the largest pieces of memory."""

    num_bytes: int
    shape: str
    # The operation that makes it.
    source: str


@dataclass(frozen=True)
class HbmUse:
    """What a step takes of a chip's memory.

    Attributes:
        available: what programs may use.
        parameters: weights, frozen ones included.
        optimizer: Adam's moments.
        gradients: of micro-batches that are done (they are temporaries otherwise).
        batch: inputs and scalars, and what the state's last tiles are filled up with.
        temporaries: activations, gathered weights, gradients.
        program: the machine code.
        used: all together, as the compiler lays it out.
        largest: the largest temporaries, where the compiler names them: when it does not fit.
    """

    available: int
    parameters: int
    optimizer: int
    gradients: int
    batch: int
    temporaries: int
    program: int
    used: int
    largest: list[Buffer] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return self.used <= self.available


@dataclass(frozen=True)
class Figures:
    """How fast and how dear, from an `Estimate` and the FLOP counter.

    Attributes:
        step_seconds: of a whole step, all micro-batches and the traffic between slices included.
        upper_bound_seconds: the same with nothing hidden behind anything.
        mfu: with causal attention.
        mfu_full_square: with attention counted as the whole square, as tables before mid-2025 do.
        tokens_per_second: per chip.
        dollars_per_hour: of all chips.
        price: dollars per chip-hour; `price_source` and `price_date` say where from.
        tokens: to train on; None: not asked for. `days` and `dollars` are what they take.
    """

    step_seconds: float
    upper_bound_seconds: float
    mfu: float
    mfu_full_square: float
    tokens_per_second: float
    tokens_per_dollar: float
    dollars_per_hour: float
    price: float
    price_source: str
    price_date: str
    tokens: float | None = None
    days: float | None = None
    dollars: float | None = None


@dataclass(frozen=True)
class Plan:
    """The answer to one question.

    Attributes:
        config: the file's name.
        topology: the slice, such as v5e-256; several of them: 2xv5e-256.
        mesh: devices along each axis, all slices together.
        settings: what the speed depends on: seq_len, batch_size_per_device, grad_accum, remat, layers, attention,
            compute_dtype, precision, lora_rank (None: full training).
        rows: sequences per step, on all chips together.
        compiled: whether the TPU compiler was asked; otherwise everything is arithmetic, a bound rather than an
            estimate: ``estimate`` is None and the figures are those of a machine that loses no time.
        memory: of the step's largest graph.
        estimate: of all graphs of a step together; None where it does not fit, or was not compiled.
        figures: None where there is no time to derive them from.
        advice: where it does not fit, what would make it fit, best first.
        notes: what a reader must know to take the figures for what they are.
        versions: of the packages that decided.
    """

    config: str
    topology: str
    chip: str
    num_chips: int
    mesh: dict[str, int]
    settings: dict[str, Any]
    rows: int
    tokens_per_step: int
    compiled: bool
    memory: HbmUse
    estimate: Estimate | None
    figures: Figures | None
    advice: list[str]
    notes: list[str]
    versions: dict[str, str]
