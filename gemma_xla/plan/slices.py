"""The hardware a plan is for: one slice, or several side by side."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from gemma_xla.chips import Chip, Topology, topology
from gemma_xla.config import MeshSection, RunConfig
from gemma_xla.errors import UserError
from gemma_xla.sharding import MeshShape, resolve_mesh


@dataclass(frozen=True)
class Hardware:
    """Equal slices, each of which holds the whole model; the mesh's data axis runs across them (over DCN).

    Attributes:
        name: such as v5e-256, or 2xv5e-256.
        slice: one of them.
        count: how many there are.
        mesh: of all devices together.
        chip: at the price that the plan is to reckon with.
    """

    name: str
    slice: Topology
    count: int
    mesh: MeshShape
    chip: Chip

    @property
    def num_chips(self) -> int:
        return self.count * self.slice.num_chips

    @property
    def num_hosts(self) -> int:
        return self.count * self.slice.num_hosts

    @property
    def slice_mesh(self) -> MeshShape:
        """Devices of one slice along each axis."""
        return dataclasses.replace(self.mesh, data=self.mesh.data // self.count)


def hardware(config: RunConfig, name: str | None = None) -> Hardware:
    """Return the slices called ``name`` or, without one, those of the config's ``hardware.topology``.

    Raises:
        UserError: there are no such slices, none are named, or the mesh does not suit them.
    """
    name = name or config.hardware.topology
    if name is None:
        raise UserError(
            "hardware.topology is missing, so there is nothing to plan for; name a TPU slice with --topology, such as "
            "v5e-256, v5p-128 or v6e-8"
        )
    found = re.fullmatch(r"(?:(\d+)x)?(.+)", name)
    count, one = int(found[1] or 1), topology(found[2])
    if count < 1:
        raise UserError(f"topology {name!r}: give a number of slices from 1")
    mesh = _mesh(config.mesh, name, count, one.num_chips)
    price = config.hardware.price
    return Hardware(name, one, count, mesh, one.chip if price is None else one.chip.with_price(price))


def _mesh(section: MeshSection, name: str, count: int, chips: int) -> MeshShape:
    try:
        mesh = resolve_mesh(section, count * chips)
    except UserError as error:
        raise UserError(f"topology {name}: {error}") from error
    if mesh.data % count:
        raise UserError(
            f"topology {name}: mesh.data is {mesh.data}, but each of the {count} slices holds a whole model; set "
            f"mesh.data={count} (or a multiple of it)"
        )
    return mesh
