"""How often a loop of a compiled program runs.

The compiler writes a trip count down only now and then. Otherwise the loop's counter is run here: from its initial
value, through the loop's own condition and step, in integers. Nothing is guessed; what cannot be followed is an error.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

from gemma_xla.plan.hlo import Computation, Instruction, Module

_MOST_TRIPS = 100_000

_BINARY: dict[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "minimum": min,
    "maximum": max,
}
_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "EQ": operator.eq,
    "NE": operator.ne,
}
_SAME = ("copy", "bitcast", "bitcast-convert", "convert", "reshape")
_INTEGER = re.compile(r"([su])(\d+)\[\]")


class UnreadableLoopError(ValueError):
    """A loop whose trip count cannot be derived from the program."""


@dataclass(frozen=True)
class Frame:
    """A computation being run: where its parameters come from.

    Attributes:
        instruction: the fusion, call or loop that runs it; None: nobody knows the parameters.
        outer: the frame that instruction stands in.
        state: for a loop's condition and body, the parts of its tuple that are known, by index.
    """

    computation: Computation
    instruction: Instruction | None = None
    outer: Frame | None = None
    state: dict[int, int] | None = None


def trips(module: Module, loop: Instruction, frame: Frame) -> int:
    """Return how often the body of a ``while`` in ``frame`` runs.

    Raises:
        UnreadableLoopError: it depends on data, or on operations that are not followed here.
    """
    known = loop.find(r'"known_trip_count":\{"n":"(\d+)"\}')
    return int(known) if known else _Counter(module, loop, frame).run()


class _Counter:
    """Runs a loop's counter."""

    def __init__(self, module: Module, loop: Instruction, frame: Frame) -> None:
        self.module, self.loop, self.frame = module, loop, frame
        self.condition = module.computations[loop.find(r"condition=%?([\w.\-]+)") or ""]
        self.body = module.computations[loop.find(r"body=%?([\w.\-]+)") or ""]

    def run(self) -> int:
        needed = self._needed()
        state = {index: self._initial(index) for index in needed}
        for count in range(_MOST_TRIPS):
            if not self._value(self.condition.root, Frame(self.condition, self.loop, self.frame, state)):
                return count
            after = Frame(self.body, self.loop, self.frame, state)
            state = {i: self._value(self._operand(self.body.root, i, self.body), after) for i in needed}
        raise UnreadableLoopError(f"loop {self.loop.name} does not end within {_MOST_TRIPS} trips")

    def _needed(self) -> list[int]:
        """Parts of the tuple that the condition depends on, through the body's steps too."""
        found: set[int] = set()
        open_ = self._indices(self.condition, self.condition.root)
        while open_ - found:
            index = (open_ - found).pop()
            found.add(index)
            open_ |= self._indices(self.body, self._operand(self.body.root, index, self.body))
        return sorted(found)

    def _indices(self, computation: Computation, start: Instruction | None) -> set[int]:
        """Parts of the computation's tuple that an instruction depends on."""
        found, seen, todo = set(), set(), [start]
        while todo:
            instruction = todo.pop()
            if instruction is None or instruction.name in seen:
                continue
            seen.add(instruction.name)
            if _is_part(instruction, computation):
                found.add(_index(instruction))
            else:
                todo += [computation.instructions[name] for name in instruction.operands]
        return found

    def _initial(self, index: int) -> int:
        made = self.frame.computation.instructions[self.loop.operands[0]]
        return self._value(self._operand(made, index, self.frame.computation), self.frame)

    def _operand(self, made: Instruction | None, index: int, computation: Computation) -> Instruction:
        """The instruction that makes one part of a tuple."""
        if made is None or made.opcode != "tuple":
            raise UnreadableLoopError(f"loop {self.loop.name}: {made and made.opcode} makes its state")
        return computation.instructions[made.operands[index]]

    def _value(self, instruction: Instruction | None, frame: Frame) -> int:
        """The integer that an instruction computes."""
        if instruction is None:
            raise UnreadableLoopError(f"loop {self.loop.name}: {frame.computation.name} has no result")
        values = [frame.computation.instructions[name] for name in instruction.operands]
        opcode = instruction.opcode
        if opcode == "get-tuple-element":
            return self._part(instruction, frame)
        if opcode == "parameter":
            return self._argument(instruction, frame)
        if opcode == "fusion" and (called := self.module.fused(instruction)):
            return self._value(called.root, Frame(called, instruction, frame))
        if opcode == "select":
            return self._value(values[1] if self._value(values[0], frame) else values[2], frame)
        return self._compute(instruction, [self._value(value, frame) for value in values])

    def _compute(self, instruction: Instruction, values: list[int]) -> int:
        opcode = instruction.opcode
        if opcode == "constant" and (found := re.fullmatch(r"(true)|(false)|-?\d+", instruction.argument)):
            return 1 if found[1] else 0 if found[2] else int(found[0])
        if opcode in _SAME:
            return _wrapped(values[0], instruction.shape)
        if opcode in _BINARY:
            return _wrapped(_BINARY[opcode](*values), instruction.shape)
        if opcode == "compare":
            return int(_COMPARE[instruction.find(r"direction=(\w+)") or ""](*values))
        if opcode == "not" and instruction.shape.startswith("pred"):
            return 1 - values[0]
        raise UnreadableLoopError(
            f"the trip count of loop {self.loop.name} depends on {instruction.name}, a {opcode}, which is not known "
            "before the program runs"
        )

    def _part(self, instruction: Instruction, frame: Frame) -> int:
        """The value of a get-tuple-element."""
        index, made = _index(instruction), frame.computation.instructions[instruction.operands[0]]
        if made.opcode == "tuple":
            return self._value(frame.computation.instructions[made.operands[index]], frame)
        if made.opcode == "parameter" and frame.state is not None:
            return frame.state[index]
        loop, outer = frame.instruction, frame.outer
        if (
            made.opcode == "parameter"
            and loop
            and outer
            and loop.opcode == "while"
            and _is_kept(index, frame.computation)
        ):
            # A loop around this one hands it through.
            before = outer.computation.instructions[loop.operands[0]]
            return self._value(self._operand(before, index, outer.computation), outer)
        raise UnreadableLoopError(f"the trip count of loop {self.loop.name} depends on {made.name}, a {made.opcode}")

    def _argument(self, instruction: Instruction, frame: Frame) -> int:
        """The value of a parameter that is no tuple."""
        caller, outer = frame.instruction, frame.outer
        if caller is None or outer is None or caller.opcode == "while":
            raise UnreadableLoopError(
                f"the trip count of loop {self.loop.name} depends on the input {instruction.name}"
            )
        return self._value(outer.computation.instructions[caller.operands[int(instruction.argument)]], outer)


def _index(part: Instruction) -> int:
    return int(part.find(r"index=(\d+)") or 0)


def _is_part(instruction: Instruction, computation: Computation) -> bool:
    """Whether an instruction takes a part of its computation's tuple."""
    if instruction.opcode != "get-tuple-element":
        return False
    return computation.instructions[instruction.operands[0]].opcode == "parameter"


def _is_kept(index: int, body: Computation) -> bool:
    """Whether a loop's body returns a part of its state as it was."""
    if body.root is None or body.root.opcode != "tuple":
        return False
    returned = body.instructions[body.root.operands[index]]
    return _is_part(returned, body) and _index(returned) == index


def _wrapped(value: int, shape: str) -> int:
    """A value as the shape's integer type keeps it."""
    kind = _INTEGER.match(shape)
    if kind is None:
        return value
    bits = int(kind[2])
    value %= 1 << bits
    return value - (1 << bits) if kind[1] == "s" and value >> (bits - 1) else value
