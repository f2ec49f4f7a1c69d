"""The links of a slice: which of them a group of its chips can use, and how fast that is.

The chips of a slice stand on a grid, numbered along its first axis first (so are libtpu's device ids), each linked to
its neighbours. The ends of an axis are linked too, on v5e and v6e where it has 16 chips (a pod's full side), on v5p
where every axis is a multiple of 4 (cubes, joined by optical switches). Along such a ring a chip sends and receives
over two links. Along a line (of a smaller slice, or where a group takes only part of an axis) it is reckoned with one,
as that is what the chips at its ends have. Groups that interleave on an axis share its links.
Model and conditions: How to Scale Your Model, parts 2 and 3, https://jax-ml.github.io/scaling-book.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from dataclasses import dataclass

from gemma_xla.chips import Chip, topology
from gemma_xla.errors import UserError

_POD_SIDE = 16
_CUBE_SIDE = 4


@dataclass(frozen=True)
class Way:
    """What a group of chips has of one axis of the grid.

    Attributes:
        chips: of the group, along the axis.
        is_ring: whether its ends are linked.
        sharers: groups that use the same links.
    """

    chips: int
    is_ring: bool
    sharers: int

    @property
    def links(self) -> float:
        """Links per chip in one direction."""
        return (2 if self.is_ring else 1) / self.sharers


@dataclass(frozen=True)
class Torus:
    """A slice's grid.

    Attributes:
        shape: chips along each axis.
        is_ring: for each axis, whether its ends are linked.
    """

    shape: tuple[int, ...]
    is_ring: tuple[bool, ...]

    def place(self, chip: int) -> tuple[int, ...]:
        """Coordinates of a chip."""
        found = []
        for length in self.shape:
            chip, coordinate = divmod(chip, length)
            found.append(coordinate)
        return tuple(found)

    def ways(self, group: Iterable[int]) -> list[Way]:
        """The axes that a group can use; a group that is no grid of its own has one link."""
        places = [self.place(chip) for chip in group]
        taken = [sorted(set(axis)) for axis in zip(*places, strict=True)]
        strides = [axis[1] - axis[0] if len(axis) > 1 else 1 for axis in taken]
        regular = all(
            axis == list(range(axis[0], axis[-1] + 1, stride)) for axis, stride in zip(taken, strides, strict=True)
        )
        if not regular or math.prod(map(len, taken)) != len(places):
            return [Way(len(places), False, 1)]
        return [
            Way(len(axis), ring and len(axis) * stride == length, stride)
            for axis, stride, length, ring in zip(taken, strides, self.shape, self.is_ring, strict=True)
            if len(axis) > 1
        ]

    def busiest_link(self, pairs: Iterable[tuple[int, int]]) -> int:
        """How many messages cross the busiest link, one for each pair of chips, along one axis after the other."""
        load: dict[tuple[tuple[int, ...], int, int], int] = {}
        for source, target in pairs:
            place, end = list(self.place(source)), self.place(target)
            for axis, length in enumerate(self.shape):
                ahead = end[axis] - place[axis]
                if self.is_ring[axis]:
                    ahead = (ahead + length // 2) % length - length // 2
                step = 1 if ahead > 0 else -1
                for _ in range(abs(ahead)):
                    link = (tuple(place), axis, step)
                    load[link] = load.get(link, 0) + 1
                    place[axis] = (place[axis] + step) % length
        return max(load.values(), default=0)


def torus(chip: Chip, num_chips: int) -> Torus:
    """Return the grid of the slice of that many chips.

    Raises:
        UserError: no such slice is on sale.
    """
    for number in (num_chips, 2 * num_chips):
        # Some names count a chip's two cores.
        with contextlib.suppress(UserError):
            found = topology(f"{chip.name}-{number}")
            if found.num_chips == num_chips:
                return _torus(found.shape)
    raise UserError(f"topology: no slice of {num_chips} {chip.name} chips is on sale")


def _torus(shape: tuple[int, ...]) -> Torus:
    if len(shape) == 3:
        return Torus(shape, tuple(all(length % _CUBE_SIDE == 0 for length in shape) for _ in shape))
    return Torus(shape, tuple(length == _POD_SIDE for length in shape))
