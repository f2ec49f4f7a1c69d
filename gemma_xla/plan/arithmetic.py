"""What a step takes at the very least, by arithmetic: less memory or less time no compiler can make of it.

Both bounds leave out what a compiler might avoid, so the truth lies above them, for memory often far above.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from gemma_xla.chips import CHIPS, Chip, Sourced
from gemma_xla.errors import UserError
from gemma_xla.plan.result import HbmUse
from gemma_xla.plan.settings import Settings, Variants, settings_of, tensor_sizes
from gemma_xla.plan.setup import Setup
from gemma_xla.plan.step_time import step_time
from gemma_xla.plan.units import gib
from gemma_xla.temporaries import temporaries

_MIB = 2**20
_libtpu = "libtpu 0.0.21, from its account of programs that do not fit: {} MiB of memory less {} MiB reserved"
# Bytes that programs may use.
_AVAILABLE = {
    name: Sourced((total - reserved) * _MIB, _libtpu.format(total, reserved), "2026-11")
    for name, total, reserved in (("v5e", 16384, 258), ("v5p", 98304, 263), ("v6e", 32256, 260))
}
# Three arrays of int32 and one of int64 for each position (`gemma_xla.data.packing.pack`).
_BATCH_BYTES = 20
_MOMENTS = 2
# Advice must do away with this part of what is too much.
_WORTH = 0.1
_SMALLEST_CHUNK = 64


def available(chip: Chip) -> int:
    """Bytes of a chip's memory that programs may use, as the compiler says."""
    return int(_AVAILABLE[chip.name].value)


def bounds(setup: Setup) -> tuple[HbmUse, float]:
    """Return what a step takes of a chip's memory at least, and its seconds at least."""
    return _memory(setup, temporaries(setup.step)), step_time(setup).least


def _memory(setup: Setup, temporary: int) -> HbmUse:
    held = setup.memory
    parts = {
        "parameters": held.frozen + held.trained,
        "optimizer": _MOMENTS * held.trained,
        "gradients": held.trained if setup.config.train.grad_accum > 1 else 0,
        "batch": setup.step.positions * _BATCH_BYTES,
        "temporaries": temporary,
        "program": 0,
    }
    return HbmUse(available=available(setup.hardware.chip), **parts, used=sum(parts.values()))


def advice(setup: Setup, memory: HbmUse) -> list[str]:
    """Return what would make a step fit that does not, best first: the keys to set, and the memory it would take then.

    The temporaries in ``memory``, where those are the compiler's, are taken to change as their bound does. Best is what
    keeps the slice and costs least by the bound of the step's time. Where no change of that kind suffices alone,
    several together are looked for; and where nothing suffices, what would help.

    Args:
        setup: what does not fit.
        memory: what it takes.
    """
    base, variants = settings_of(setup.config, setup.hardware), Variants(setup.config)
    floor = _memory(setup, temporaries(setup.step, frugal=False))

    def options(changes: Iterable[dict[str, Any]]) -> list[_Option]:
        found = (_option(variants, base, change, memory, floor) for change in changes)
        return [option for option in found if option]

    def best(kinds: Iterable[list[dict[str, Any]]]) -> list[_Option]:
        """Of each kind the mildest change that suffices, or else the strongest."""
        return [next((o for o in found if o.fits), found[-1]) for kind in kinds if (found := options(kind))]

    here = _changes(setup, variants, base)
    found = best(here)
    if not any(option.fits for option in found):
        product = itertools.product(*([{}, *kind] for kind in here))
        together = options({k: v for part in parts for k, v in part.items()} for parts in product)
        found += sorted((option for option in together if option.fits), key=_Option.rank)[:1]
    found += best([list(_larger(base)), *([other] for other in _roomier(setup))])
    enough = _WORTH * (memory.used - memory.available)
    fitting = [option for option in found if option.fits]
    helping = [option for option in found if memory.used - option.memory.used >= enough]
    return [option.line(base, memory) for option in sorted(fitting or helping, key=_Option.rank)]


@dataclass(frozen=True)
class _Option:
    settings: Settings
    changes: dict[str, Any]
    memory: HbmUse
    dollars: float

    @property
    def fits(self) -> bool:
        return self.memory.fits

    def rank(self) -> tuple:
        if not self.fits:
            return 1, self.memory.used
        return 0, "hardware.topology" in self.changes, self.dollars, len(self.changes), self.memory.used

    def line(self, base: Settings, before: HbmUse) -> str:
        keys = ", ".join(f"{key}={value}" for key, value in self.changes.items())
        parts = ("parameters", "optimizer", "gradients", "temporaries")
        changed = [(name, getattr(self.memory, name), getattr(before, name)) for name in parts]
        figures = [f"{name} {gib(new)} instead of {gib(old)}" for name, new, old in changed if new != old]
        over = self.memory.used - self.memory.available
        verdict = "fits" if over <= 0 else f"still {gib(over)} GiB too much"
        rows = "" if self.settings.rows == base.rows else f"; {self.settings.rows} rows per step instead of {base.rows}"
        use = f"{gib(self.memory.used)} of {gib(self.memory.available)} GiB"
        return f"{keys}: about {use} ({', '.join([*figures, verdict])}){rows}"


def _option(
    variants: Variants, base: Settings, change: dict[str, Any], memory: HbmUse, floor: HbmUse
) -> _Option | None:
    settings = dataclasses.replace(base, **change).keep_rows(base.rows)
    try:
        setup = variants.setup(settings)
    except UserError:
        return None
    least = _memory(setup, temporaries(setup.step, frugal=False))
    temporary = int(least.temporaries * max(1.0, memory.temporaries / floor.temporaries))
    # What the compiler adds to the other parts stays.
    others = least.used - least.temporaries + max(0, memory.used - memory.temporaries - floor.used + floor.temporaries)
    changed = dataclasses.replace(least, temporaries=temporary, program=memory.program, used=others + temporary)
    dollars = step_time(setup).least * setup.hardware.num_chips * setup.hardware.chip.price.value / setup.rows
    return _Option(settings, settings.keys(base), changed, dollars)


def _changes(setup: Setup, variants: Variants, base: Settings) -> list[list[dict[str, Any]]]:
    """Changes on the same slice by kind, mild ones first."""
    count, devices = setup.hardware.count, base.fsdp * base.tensor
    batches = [base.batch_size_per_device // 2**k for k in range(1, base.batch_size_per_device.bit_length())]
    chunks = [base.loss_chunk // n for n in (2, 4) if base.loss_chunk // n >= _SMALLEST_CHUNK]
    sizes = [n for n in tensor_sizes(setup.hardware) if n > base.tensor and devices % n == 0]
    meshes: list[dict[str, Any]] = [{"tensor": n, "fsdp": devices // n} for n in sizes]
    if base.data > count:
        meshes.insert(0, {"data": count, "fsdp": base.fsdp * base.data // count})
    return [
        [{"loss_chunk": chunk} for chunk in chunks],
        [{"batch_size_per_device": rows} for rows in batches],
        _keeping_less(variants, base),
        [{"layers": "loop"}] if base.layers == "scan" else [],
        meshes,
    ]


def _keeping_less(variants: Variants, base: Settings) -> list[dict[str, Any]]:
    """What may be kept that is less than what is kept."""
    choices = variants.kept_choices
    own = {"remat": base.remat, "keep": base.keep}
    return choices[choices.index(own) + 1 :] if own in choices else choices[-1:] * bool(base.keep)


def _larger(base: Settings) -> Iterator[dict[str, Any]]:
    """Slices of two, four and eight times the chips; each then holds less of the model."""
    stem, number = re.fullmatch(r"(.*-)(\d+)", base.topology).groups()
    for times in (2, 4, 8):
        fsdp = base.fsdp * times
        rows = max(1, min(base.batch_size_per_device, base.rows // (base.data * fsdp)))
        yield {"topology": f"{stem}{int(number) * times}", "fsdp": fsdp, "batch_size_per_device": rows}


def _roomier(setup: Setup) -> Iterator[dict[str, Any]]:
    """Slices of as many chips of another kind, with more memory."""
    count, chips = setup.hardware.count, setup.hardware.slice.num_chips
    prefix = f"{count}x" if count > 1 else ""
    for name in _AVAILABLE:
        if available(CHIPS[name]) > available(setup.hardware.chip):
            # The number in a v5p's name counts its two cores.
            yield {"topology": f"{prefix}{name}-{chips * (2 if name == 'v5p' else 1)}"}
