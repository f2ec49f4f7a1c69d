"""How long a compiled program takes, without running it.

The TPU compiler schedules every fusion in cycles, memory traffic included, and writes the number into the program. An
estimate is the sum of them, over loops as often as they run, divided by the chip's clock. To it come collectives, which
the compiler does not price (`collectives`), and Pallas kernels (`kernels`). Collectives that the compiler splits into a
start and an end, or works off piece by piece beside matrix products, hide behind the computation of the loop body (or
the rest of the program) that they are in, as far as it lasts; the others do not. Latencies, and whatever slows a chip
down or makes it wait for another, are left out.

Instructions that have no cycles:
- copies between the device's memory and the chip's own (``copy-start``, ``slice-start``) run beside computation and are
  taken as hidden (for Gemma 2B, all of them together are 0.4% of a step's time);
- what only moves data, or computes on a scalar, costs its bytes at the memory's bandwidth. Of gathered and scattered
  rows and updated slices only these count; for scattered rows that is a lower bound;
- what has matrix products counts at the chip's peak, and is listed as unpriced;
- sorting, random numbers, and custom calls that do something unknown have no price: they are listed as unpriced.
"""

from __future__ import annotations

from gemma_xla.chips import Chip
from gemma_xla.plan.collectives import KINDS, Fabric
from gemma_xla.plan.hlo import Computation, Instruction, Module, parse
from gemma_xla.plan.kernels import TARGET, kernel_cycles, kernel_name
from gemma_xla.plan.loops import Frame, trips
from gemma_xla.plan.origin import Origins, source
from gemma_xla.plan.products import Product, products
from gemma_xla.plan.result import Collective, Estimate, Matmul
from gemma_xla.plan.tally import Tally
from gemma_xla.plan.torus import torus
from gemma_xla.plan.traffic import BOOKKEEPING, FREE, UNPRICED, moved_bytes
from gemma_xla.sharding import MeshShape

_START = 'custom_call_target="AsyncCollectiveStart"'
# How the compiler names the computation of a fusion that is a reduce-scatter.
_SCATTER = "all-reduce-scatter"
_TARGET = r'custom_call_target="([^"]*)"'


def estimate(text: str, chip: Chip, mesh: MeshShape) -> Estimate:
    """Estimate how long a program takes on one slice.

    Args:
        text: the compiled, scheduled HLO.
        chip: a TPU.
        mesh: the slice's devices along each axis.

    Raises:
        UserError: no slice of that many chips is on sale.
        UnreadableLoopError: a loop's trip count depends on data.
    """
    module = parse(text)
    tally = _Walk(module, chip, mesh).tally(Frame(module.entry))
    waits, overlapping = tally.communicating(overlaps=False), tally.communicating(overlaps=True)
    parts = {part: tally.seconds[part] for part in ("matmuls", "attention", "other")} | {"collectives": waits}
    if tally.waiting:
        parts["waiting"] = tally.waiting
    return Estimate(
        seconds=tally.total,
        upper_bound_seconds=tally.computing + waits + overlapping,
        parts=parts,
        collectives=sorted(tally.collectives.values(), key=lambda one: -one.seconds),
        matmuls=sorted(tally.matmuls.values(), key=lambda one: one.ideal_seconds - one.seconds),
        unpriced=[f"{name}: {count}" for name, count in sorted(tally.unpriced.items())],
    )


class _Walk:
    """Goes through a program in the order it runs in."""

    def __init__(self, module: Module, chip: Chip, mesh: MeshShape) -> None:
        if chip.clock is None or chip.link_bandwidth is None or chip.hbm_bandwidth is None:
            raise ValueError(f"{chip.name} is not a TPU of the catalogue")
        self.module, self.chip, self.origins = module, chip, Origins(module)
        self.clock, self.bandwidth = chip.clock.value, chip.hbm_bandwidth.value
        self.fabric = Fabric(mesh, torus(chip, mesh.num_devices), chip.link_bandwidth.value)
        # Collectives that a fusion starts are carried on by others, under the same channel.
        self.started = {_channel(i) for c in module.computations.values() if _starts(c) for i in _collectives(c)}

    def tally(self, frame: Frame) -> Tally:
        """What the computation of a frame costs."""
        tally, inner = Tally(), Tally()
        for instruction in frame.computation.instructions.values():
            if instruction.opcode in ("while", "conditional", "call"):
                inner.add(*self._called(instruction, frame))
            else:
                self._add(tally, instruction, frame.computation)
        tally.waiting = max(0.0, tally.communicating(overlaps=True) - tally.computing)
        tally.add(inner)
        return tally

    def _called(self, instruction: Instruction, frame: Frame) -> tuple[Tally, int]:
        """What an instruction runs, and how often."""
        if instruction.opcode == "while":
            body = self.module.computations[instruction.find(r"body=%?([\w.\-]+)") or ""]
            return self.tally(Frame(body, instruction, frame)), trips(self.module, instruction, frame)
        names = [instruction.called or ""] if instruction.opcode == "call" else instruction.branches
        # Which branch is taken is not known before: the one that takes longest.
        choices = [self.tally(Frame(self.module.computations[name], instruction, frame)) for name in names]
        return max(choices, key=lambda choice: choice.total), 1

    def _add(self, tally: Tally, instruction: Instruction, computation: Computation) -> None:
        """Add an instruction that runs nothing else."""
        if instruction.opcode in FREE or instruction.opcode.endswith(("-done", "-update")):
            return
        transfers, cycles = self._transfers(instruction, computation), instruction.estimated_cycles
        for one in transfers:
            tally.collect(one)
        called = self.module.computations.get(instruction.called or "")
        for one in called.instructions.values() if called else ():
            # A kernel beside which a collective is worked off.
            if one.opcode == "custom-call" and one.find(_TARGET) == TARGET:
                self._custom_call(tally, one, called)
        if instruction.opcode == "custom-call":
            self._custom_call(tally, instruction, computation)
        elif cycles is not None:
            self._compute(tally, instruction, computation, cycles / self.clock)
        elif _is_collective(instruction) or _collectives(called):
            return
        elif found := products(self.module, instruction, computation):
            tally.unpriced[f"{instruction.opcode} with products, counted at the chip's peak"] += 1
            self._compute(tally, instruction, computation, sum(map(self._ideal_seconds, found)))
        elif instruction.opcode in UNPRICED:
            tally.unpriced[instruction.opcode] += 1
        else:
            seconds = moved_bytes(self.module, instruction, computation) / self.bandwidth
            tally.seconds[self.origins.part(instruction, [])] += seconds

    def _compute(self, tally: Tally, instruction: Instruction, computation: Computation, seconds: float) -> None:
        found = products(self.module, instruction, computation)
        tally.seconds[self.origins.part(instruction, found)] += seconds
        if found:
            ideal = sum(map(self._ideal_seconds, found))
            origin = source(max(found, key=lambda product: product.flops).instruction)
            tally.multiply(Matmul(instruction.name, instruction.shape, 1, seconds, ideal, origin))

    def _ideal_seconds(self, product: Product) -> float:
        peak = self.chip.peak_int8 if product.is_int8 and self.chip.peak_int8 else self.chip.peak_flops
        return product.flops / peak.value

    def _custom_call(self, tally: Tally, instruction: Instruction, computation: Computation) -> None:
        target, cycles = instruction.find(_TARGET) or "", instruction.estimated_cycles
        if target == TARGET and cycles is None:
            cycles = kernel_cycles(instruction, computation.taken(instruction), self.chip)
        if cycles is not None:
            tally.seconds["attention" if target == TARGET else "other"] += cycles / self.clock
        elif target not in BOOKKEEPING:
            tally.unpriced[kernel_name(instruction) if target == TARGET else target] += 1

    def _transfers(self, instruction: Instruction, computation: Computation) -> list[Collective]:
        """The collectives that begin with an instruction."""
        if _is_collective(instruction):
            overlaps = instruction.opcode.endswith("-start")
            return [self._priced(instruction, computation, overlaps)]
        called = self.module.computations.get(instruction.called or "")
        if called is None or instruction.opcode not in ("fusion", "async-start"):
            return []
        overlaps = instruction.opcode == "async-start" or _starts(called)
        return [
            self._priced(one, called, overlaps)
            for one in _collectives(called)
            if overlaps or _channel(one) not in self.started
        ]

    def _priced(self, instruction: Instruction, computation: Computation, overlaps: bool) -> Collective:
        scatters = instruction.opcode == "all-reduce" and computation.name.startswith(_SCATTER)
        found = self.fabric.price(instruction, computation.taken(instruction), scatters=scatters)
        return Collective(found.kind, found.axis, 1, found.num_bytes, found.seconds, overlaps)


def _is_collective(instruction: Instruction) -> bool:
    return instruction.opcode.removesuffix("-start") in KINDS


def _collectives(computation: Computation | None) -> list[Instruction]:
    return [one for one in computation.instructions.values() if _is_collective(one)] if computation else []


def _channel(instruction: Instruction) -> str | None:
    return instruction.find(r"channel_id=(\d+)")


def _starts(computation: Computation) -> bool:
    """Whether a fusion's computation starts a collective that others carry on."""
    return any(_START in instruction.attributes for instruction in computation.instructions.values())
