"""What may be set otherwise to make a run fit or faster, while it learns the same."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemma_xla.config import RunConfig
from gemma_xla.config_file import validate
from gemma_xla.errors import UserError
from gemma_xla.plan.setup import Setup, prepare
from gemma_xla.plan.slices import Hardware, hardware
from gemma_xla.sharding import MeshShape
from gemma_xla.temporaries import kept_choices

if TYPE_CHECKING:
    from gemma_xla.train.memory import Memory

_KEYS = {"topology": "hardware.topology"} | {axis: f"mesh.{axis}" for axis in ("data", "fsdp", "tensor")}


@dataclass(frozen=True)
class Settings:
    """Where a run happens and how it is cut; the names are those of the config's keys."""

    topology: str
    data: int
    fsdp: int
    tensor: int
    batch_size_per_device: int
    grad_accum: int
    remat: str
    keep: tuple[tuple[str, int | str], ...]
    layers: str
    loss_chunk: int

    @property
    def rows(self) -> int:
        """Sequences per step."""
        return self.batch_size_per_device * self.data * self.fsdp * self.grad_accum

    def keep_rows(self, rows: int) -> Settings:
        """Return the same with as many micro-batches as make a step of ``rows`` or, failing that, nearly so."""
        micro_batch = self.batch_size_per_device * self.data * self.fsdp
        return dataclasses.replace(self, grad_accum=max(1, rows // micro_batch))

    def keys(self, other: Settings | None = None) -> dict[str, Any]:
        """The config's keys and their values; with ``other`` those alone that differ from its."""
        fields, before = ({**dataclasses.asdict(s), "keep": dict(s.keep)} if s else {} for s in (self, other))
        return {_KEYS.get(k, f"train.{k}"): v for k, v in fields.items() if k not in before or before[k] != v}


class Variants:
    """One config under many settings."""

    def __init__(self, config: RunConfig) -> None:
        self._tree = config.model_dump()
        # One of the two says how many rows there are.
        self._tree["train"]["batch_size"] = None
        # What the weights take does not depend on more than the mesh, and takes long to add up.
        self._memory: dict[MeshShape, Memory | UserError] = {}

        self.kept_choices = [choice | {"keep": tuple(choice["keep"].items())} for choice in kept_choices(config.train)]

    def setup(self, settings: Settings) -> Setup:
        """
        Raises:
            UserError: the settings do not suit the config's model.
        """
        tree = {key: dict(value) if isinstance(value, dict) else value for key, value in self._tree.items()}
        for key, value in settings.keys().items():
            section, _, name = key.partition(".")
            tree[section][name] = value
        config = validate(tree, "the plan")
        setup = prepare(config, hardware(config))
        mesh = setup.hardware.slice_mesh
        if mesh not in self._memory:
            try:
                self._memory[mesh] = setup.memory
            except UserError as error:
                self._memory[mesh] = error
        if isinstance(known := self._memory[mesh], UserError):
            raise known
        vars(setup)["memory"] = known
        return setup


def settings_of(config: RunConfig, where: Hardware) -> Settings:
    """The settings of a config; a batch that cannot be dealt out evenly is rounded down."""
    mesh, train = where.mesh, config.train
    rows = train.batch_size_per_device or max(1, train.batch_size // (train.grad_accum * mesh.batch_shards))
    return Settings(
        topology=where.name,
        data=mesh.data,
        fsdp=mesh.fsdp,
        tensor=mesh.tensor,
        batch_size_per_device=rows,
        grad_accum=train.grad_accum,
        remat=train.remat,
        keep=tuple(train.keep.items()),
        layers=train.layers,
        loss_chunk=train.loss_chunk,
    )


def tensor_sizes(where: Hardware) -> list[int]:
    """The sizes of the mesh's tensor axis that a slice allows; whether they suit the model is another matter."""
    chips, alone = where.slice.num_chips, where.num_hosts == 1
    return [n for n in (1, 2, 4, 8) if chips % n == 0 and (n == 1 or alone)]
