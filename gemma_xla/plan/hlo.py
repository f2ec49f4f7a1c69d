"""HLO text as data: computations of instructions, with what an estimate needs of each.

HLO is the compiler's language (https://openxla.org/xla/operation_semantics). Read is what the TPU compiler prints for a
compiled module: one instruction to a line, ``%name = shape opcode(operands), attributes``.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from functools import cached_property

_ITEMSIZE = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "s16": 2,
    "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8, "c64": 8,
}  # fmt: skip
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_START = re.compile(r"  (ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"([\w\-]+)\(")
_NAME = re.compile(r"%([\w.\-]+)")
# Type, dimensions and, in the layout, the memory: S(1) and above are on the chip itself.
_ARRAY = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\](?:\{[^{}]*?(S\(\d+\))?(?:SC\([^)]*\))?\})?")


# What the compiler writes where it does not know (a few of v5p's fusions).
_UNKNOWN_CYCLES = 2**63 - 1


@dataclass(frozen=True)
class Array:
    """One array of a shape."""

    dtype: str
    dims: tuple[int, ...]
    # Whether it lies in the device's main memory.
    in_hbm: bool

    @property
    def num_elements(self) -> int:
        return math.prod(self.dims)

    @property
    def num_bytes(self) -> int:
        return math.ceil(self.num_elements * _ITEMSIZE.get(self.dtype, 0))


def arrays(shape: str) -> list[Array]:
    """The arrays of a shape in HLO's notation; a tuple has several."""
    found = _ARRAY.findall(shape)
    return [Array(dtype, tuple(map(int, dims.split(","))) if dims else (), not space) for dtype, dims, space in found]


@dataclass
class Instruction:
    """One line.

    Attributes:
        shape: of the result, in HLO's notation.
        operands: names of instructions of the same computation.
        argument: what stands in the parentheses, such as a constant's value.
        attributes: what follows them, unread.
    """

    name: str
    opcode: str
    shape: str
    operands: list[str]
    argument: str
    attributes: str

    def find(self, pattern: str) -> str | None:
        """The first group of a pattern in the attributes."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else None

    @cached_property
    def arrays(self) -> list[Array]:
        return arrays(self.shape)

    @cached_property
    def estimated_cycles(self) -> int | None:
        """The compiler's estimate, memory traffic included; None where it makes none."""
        found = int(self.find(r'"estimated_cycles":"(\d+)"') or _UNKNOWN_CYCLES)
        return None if found == _UNKNOWN_CYCLES else found

    @property
    def op_name(self) -> str:
        """The operation it comes from; empty where the compiler does not tell."""
        return self.find(r'op_name="([^"]*)"') or ""

    @property
    def source_file(self) -> str:
        """The line of Python's file it comes from; empty where the compiler does not tell."""
        return self.find(r'source_file="([^"]*)"') or ""

    @property
    def called(self) -> str | None:
        """The computation that a fusion, call or asynchronous operation runs."""
        return self.find(r"(?:calls|to_apply)=%?([\w.\-]+)")

    @property
    def branches(self) -> list[str]:
        """The computations of a conditional."""
        several = self.find(r"branch_computations=\{([^}]*)\}")
        return (
            re.findall(r"%?([\w.\-]+)", several)
            if several
            else re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", self.attributes)
        )


@dataclass
class Computation:
    """A function: instructions by name, in the order they run in."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: Instruction | None = None

    @cached_property
    def parameters(self) -> dict[int, str]:
        """Names of the parameters by their number."""
        return {int(i.argument): i.name for i in self.instructions.values() if i.opcode == "parameter"}

    def taken(self, instruction: Instruction) -> list[Array]:
        """The arrays that an instruction takes."""
        return [array for name in instruction.operands for array in self.instructions[name].arrays]


@dataclass
class Module:
    """A program."""

    computations: dict[str, Computation]
    entry: Computation

    def fused(self, instruction: Instruction) -> Computation | None:
        """What a fusion runs; None for any other instruction."""
        return self.computations.get(instruction.called or "") if instruction.opcode == "fusion" else None


def parse(text: str) -> Module:
    """Read a module.

    Raises:
        ValueError: there is no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry = current = None
    for line in text.splitlines():
        if current is None:
            # A line of the module's header may be as long as a computation's, and costs time to match.
            if line.endswith("{") and (header := _HEADER.match(line)):
                current = computations[header[2]] = Computation(header[2])
                entry = current if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif start := _START.match(line):
            _add(current, line, start)
    if entry is None:
        raise ValueError("the text is no HLO module: it has no ENTRY computation")
    return Module(computations, entry)


def _add(computation: Computation, line: str, start: re.Match[str]) -> None:
    """Read the line of an instruction into ``computation``."""
    end = _closing(line, start.end()) + 1 if line[start.end()] == "(" else line.index(" ", start.end())
    opcode = _OPCODE.match(line, end + 1)
    if opcode is None:
        raise ValueError(f"an HLO instruction is not as expected: {line.strip()[:200]}")
    close = _closing(line, opcode.end() - 1)
    argument = line[opcode.end() : close]
    instruction = Instruction(
        start[2], opcode[1], line[start.end() : end], _NAME.findall(argument), argument, line[close + 1 :]
    )
    computation.instructions[start[2]] = instruction
    if start[1]:
        computation.root = instruction


def _closing(line: str, start: int) -> int:
    """Index of the parenthesis that closes the one at ``start``."""
    depth = 0
    for found in _PARENTHESES.finditer(line, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"an HLO instruction is cut off: {line.strip()[:200]}")


_PARENTHESES = re.compile(r"[()]")
