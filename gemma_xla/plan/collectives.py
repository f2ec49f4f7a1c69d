"""What transfers between the chips of a slice cost, which the compiler does not say.

A transfer is priced by its bytes over the links that its groups can use (`torus`), at their nominal speed, without
latency. With n chips in a group and a tensor of N bytes (whole: gathered, or to be reduced) over links of B bytes/s, of
which a chip can use L in one direction (along several axes of the grid: all of theirs):

- all-gather, reduce-scatter: N (n - 1) / n / (L B);
- all-reduce: both, one after the other;
- all-to-all: half of what either half of the busiest axis holds crosses its middle. That takes, with c chips along the
  axis, c N / n / (8 B) on a ring and c N / n / (4 B) on a line;
- collective-permute: what crosses the busiest link, each message going along one axis after the other.

Mesh axes get their names from the groups: device number = (data x |fsdp| + fsdp) x |tensor| + tensor.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from gemma_xla.plan.hlo import Array, Instruction
from gemma_xla.plan.torus import Torus
from gemma_xla.sharding import AXES, MeshShape

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclass(frozen=True)
class Transfer:
    """One collective operation.

    Attributes:
        kind: one of `KINDS`.
        axis: names of the mesh axes it runs along, such as "data+fsdp".
        num_bytes: of the whole tensor.
        seconds: at the links' nominal speed.
    """

    kind: str
    axis: str
    num_bytes: int
    seconds: float


@dataclass(frozen=True)
class Fabric:
    """What prices transfers.

    Attributes:
        mesh: names the axes.
        torus: the slice.
        link_bandwidth: bytes per second of one link in one direction.
    """

    mesh: MeshShape
    torus: Torus
    link_bandwidth: float

    def price(self, instruction: Instruction, operands: list[Array], *, scatters: bool = False) -> Transfer:
        """Price one collective instruction.

        Args:
            instruction: it, or what starts it where it is asynchronous.
            operands: the arrays it takes.
            scatters: an all-reduce of which each chip keeps only its part, which the compiler makes one operation.
        """
        kind = "reduce-scatter" if scatters else instruction.opcode.removesuffix("-start")
        taken = sum(array.num_bytes for array in operands)
        if kind == "collective-permute":
            return self._permute(instruction, taken)
        groups = read_groups(instruction, self.mesh.num_devices)
        size = len(groups[0])
        num_bytes = taken * size if kind in ("all-gather", "all-to-all") else taken
        ways = self.torus.ways(groups[0])
        if size == 1:
            seconds = 0.0
        elif kind == "all-to-all":
            loads = [taken * way.chips / (8 if way.is_ring else 4) * way.sharers for way in ways]
            seconds = max(loads) / self.link_bandwidth
        else:
            passes = 2 if kind == "all-reduce" else 1
            links = sum(way.links for way in ways)
            seconds = passes * num_bytes * (size - 1) / size / (links * self.link_bandwidth)
        return Transfer(kind, self.axis(groups), num_bytes, seconds)

    def _permute(self, instruction: Instruction, num_bytes: int) -> Transfer:
        pairs = read_pairs(instruction)
        seconds = self.torus.busiest_link(pairs) * num_bytes / self.link_bandwidth
        return Transfer("collective-permute", self.axis(pairs), num_bytes, seconds)

    def axis(self, groups: list[tuple[int, ...]]) -> str:
        """Names of the mesh axes along which the members of a group differ."""
        places = [[self._place(device) for device in group] for group in groups]
        moved = [any(len({place[i] for place in group}) > 1 for group in places) for i in range(len(AXES))]
        return "+".join(axis for axis, moves in zip(AXES, moved, strict=True) if moves)

    def _place(self, device: int) -> tuple[int, int, int]:
        rest, tensor = divmod(device, self.mesh.tensor)
        data, fsdp = divmod(rest, self.mesh.fsdp)
        return data, fsdp, tensor


def read_groups(instruction: Instruction, num_devices: int) -> list[tuple[int, ...]]:
    """The device numbers of each group that works together.

    Raises:
        ValueError: they are written in an unknown way.
    """
    if listed := instruction.find(r"replica_groups=\{(\{[\d,{}]*\})\}"):
        return [tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", listed)]
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", instruction.attributes)
    if iota:
        return _iota_groups(*iota.groups())
    if "replica_groups={}" in instruction.attributes:
        return [tuple(range(num_devices))]
    raise ValueError(f"{instruction.name}: its replica_groups are written in an unknown way")


def _iota_groups(shape: str, reshape: str, transpose: str | None) -> list[tuple[int, ...]]:
    """``[groups,size]<=[a,b]T(1,0)``: numbers counted up in [a, b], transposed, and cut into groups."""
    size = int(shape.split(",")[-1])
    dims = [int(d) for d in reshape.split(",")]
    order = [int(d) for d in transpose.split(",")] if transpose else list(range(len(dims)))
    strides = [math.prod(dims[i + 1 :]) for i in range(len(dims))]
    numbers = [0]
    for axis in order:
        numbers = [number + i * strides[axis] for number in numbers for i in range(dims[axis])]
    return [tuple(numbers[start : start + size]) for start in range(0, len(numbers), size)]


def read_pairs(instruction: Instruction) -> list[tuple[int, ...]]:
    """The device numbers of each source and target."""
    listed = instruction.find(r"source_target_pairs=\{(\{[\d,{}]*\})\}") or ""
    return [tuple(map(int, pair.split(","))) for pair in re.findall(r"\{([\d,]+)\}", listed)]
