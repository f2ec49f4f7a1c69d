"""The catalogue of chips: peak speed, memory, links and list price, each with its source; and the slices Google sells.

A vendor's GB of device memory are 2^30 bytes (a 16 GB TPU v5e has 16 GiB), its GB/s are 10^9 bytes per second.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from gemma_xla.errors import UserError, nearest


@dataclass(frozen=True)
class Sourced:
    """A figure, where it is from, and when it was read there."""

    value: float
    source: str
    date: str


@dataclass(frozen=True)
class Chip:
    """One accelerator chip; figures that nobody published are None.

    Attributes:
        peak_flops: FLOP/s that MFU refers to: bfloat16 without sparsity (CPU: float32).
        peak_int8: int8 OP/s without sparsity.
        hbm_bytes: device memory in bytes, as published.
        hbm_bandwidth: bytes per second.
        link_bandwidth: bytes per second of one link to another chip, in one direction.
        num_links: links per chip (ICI, NVLink).
        dcn_bandwidth: bytes per second from one chip to other slices, over the data center network.
        clock: cycles per second, as the TPU compiler counts cycles.
        price: dollars per chip-hour, on demand.
        cores: of a chip; they work on one program, and share its kernels out if these say how.
    """

    name: str
    peak_flops: Sourced
    price: Sourced
    peak_int8: Sourced | None = None
    hbm_bytes: Sourced | None = None
    hbm_bandwidth: Sourced | None = None
    link_bandwidth: Sourced | None = None
    num_links: Sourced | None = None
    dcn_bandwidth: Sourced | None = None
    clock: Sourced | None = None
    cores: Sourced | None = None

    def with_price(self, dollars_per_hour: float) -> Chip:
        """Return the chip at another price."""
        today = datetime.date.today().isoformat()
        return dataclasses.replace(self, price=Sourced(dollars_per_hour, "set by the user", today))


@dataclass(frozen=True)
class Topology:
    """A slice of TPU chips: how many, and how they are laid out."""

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def num_chips(self) -> int:
        """Chips in the slice."""
        return math.prod(self.shape)

    @property
    def num_hosts(self) -> int:
        """Machines that drive the chips; the largest that there is drives a small slice alone."""
        return 1 if self.num_chips <= _ONE_HOST[self.chip.name] else self.num_chips // _CHIPS_PER_HOST


def _source(text: str) -> Callable[[float], Sourced]:
    """Return a function that gives figures this source."""
    return lambda value: Sourced(value, text, "2026-11")


_GIB = 2**30
_v5e = _source("Google Cloud documentation, https://docs.cloud.google.com/tpu/docs/v5e")
_v5p = _source("Google Cloud documentation, https://docs.cloud.google.com/tpu/docs/v5p")
_v6e = _source("Google Cloud documentation, https://docs.cloud.google.com/tpu/docs/v6e")
_book = _source("How to Scale Your Model, part 2, https://jax-ml.github.io/scaling-book/tpus")
_clock = _source(
    "Derived: peak FLOP/s over 2^17 (v5e), 2^18 (v5p), 2^19 (v6e) FLOP per cycle. With it the cycles libtpu 0.0.21 "
    "states give a bf16 matmul of 16384^3 92%, 94%, 78% of the peak and an fp32 copy 81%, 72%, 81% of the bandwidth"
)
_a100 = _source("NVIDIA A100 80GB SXM datasheet, as quoted at https://glennklockwood.com/garden/processors/A100")
_h100 = _source("NVIDIA H100 SXM datasheet, as quoted at https://glennklockwood.com/garden/processors/H100")
_h200 = _source("NVIDIA H200 SXM datasheet, quoted second-hand; its compute die is that of H100")
_nvlink = _source("NVIDIA datasheet: links of 50 GB/s in both directions together, 600 GB/s (A100) or 900 GB/s per GPU")
_skypilot = "SkyPilot catalogue, gcp/vms.csv at commit 006059e, https://github.com/skypilot-org/skypilot-catalog"
_tpu_price = _source(f"Google Cloud, on demand, us-east5; {_skypilot}")
_a100_price = _source("Google Cloud, on demand, us-central1, an eighth of a2-ultragpu-8g (40.22), quoted second-hand")
_h100_price = _source("Google Cloud, on demand, us-central1, an eighth of a3-highgpu-8g (88.49), quoted second-hand")
_h200_price = _source(f"Google Cloud, on demand, us-central1, an eighth of a3-ultragpu-8g (86.76); {_skypilot}")

CHIPS: dict[str, Chip] = {
    "v5e": Chip(
        name="v5e",
        peak_flops=_v5e(197e12),
        price=_tpu_price(1.20),
        peak_int8=_v5e(393e12),
        hbm_bytes=_v5e(16 * _GIB),
        hbm_bandwidth=_v5e(819e9),
        link_bandwidth=_book(45e9),
        num_links=_v5e(4),
        dcn_bandwidth=_book(3.125e9),
        clock=_clock(1.5e9),
        cores=_v5e(1),
    ),
    "v5p": Chip(
        name="v5p",
        peak_flops=_v5p(459e12),
        price=_tpu_price(4.20),
        peak_int8=_book(918e12),
        hbm_bytes=_v5p(95 * _GIB),
        hbm_bandwidth=_v5p(2765e9),
        link_bandwidth=_book(90e9),
        num_links=_v5p(6),
        dcn_bandwidth=_book(6.25e9),
        clock=_clock(1.75e9),
        cores=_v5p(2),
    ),
    "v6e": Chip(
        name="v6e",
        peak_flops=_v6e(918e12),
        price=_tpu_price(2.70),
        peak_int8=_v6e(1836e12),
        hbm_bytes=_v6e(32 * _GIB),
        hbm_bandwidth=_v6e(1638e9),
        link_bandwidth=_book(90e9),
        num_links=_v6e(4),
        dcn_bandwidth=_book(12.5e9),
        clock=_clock(1.75e9),
        cores=_v6e(1),
    ),
    "a100-80gb": Chip(
        name="a100-80gb",
        peak_flops=_a100(312e12),
        price=_a100_price(5.03),
        peak_int8=_a100(624e12),
        hbm_bytes=_a100(80 * _GIB),
        hbm_bandwidth=_a100(2039e9),
        link_bandwidth=_nvlink(25e9),
        num_links=_nvlink(12),
    ),
    "h100": Chip(
        name="h100",
        peak_flops=_h100(989.4e12),
        price=_h100_price(11.06),
        peak_int8=_h100(1978.9e12),
        hbm_bytes=_h100(80 * _GIB),
        hbm_bandwidth=_h100(3350e9),
        link_bandwidth=_nvlink(25e9),
        num_links=_nvlink(18),
    ),
    "h200": Chip(
        name="h200",
        peak_flops=_h200(989.4e12),
        price=_h200_price(10.84),
        peak_int8=_h200(1978.9e12),
        hbm_bytes=_h200(141 * _GIB),
        hbm_bandwidth=_h200(4800e9),
        link_bandwidth=_nvlink(25e9),
        num_links=_nvlink(18),
    ),
}

# torch.cuda.get_device_name's answers. Other cards of these names (PCIe, NVL, 40 GB, MIG slices) have other peaks.
_GPU_NAMES = {"NVIDIA A100-SXM4-80GB": "a100-80gb", "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200"}

# The slices on sale, from the documentation named above: v5e and v6e in a plane, v5p in space (its common shapes).
_PLANE = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SMALL = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8))
_SPACE = (*_SMALL, (8, 8, 16), (8, 16, 16), (16, 16, 16), (16, 16, 24))
_SHAPES = {"v5e": _PLANE, "v6e": _PLANE, "v5p": _SPACE}

# The most chips of a slice with a single host, and the chips of each host of larger ones (Google Cloud documentation).
_ONE_HOST = {"v5e": 8, "v5p": 4, "v6e": 8}
_CHIPS_PER_HOST = 4


def get_chip(name: str) -> Chip:
    """Return the catalogue's chip called ``name``.

    Raises:
        UserError: there is none of that name.
    """
    if name not in CHIPS:
        raise UserError(f"hardware.chip: none is called {name!r}{nearest(name, CHIPS)}; there are {', '.join(CHIPS)}")
    return CHIPS[name]


def topology(name: str) -> Topology:
    """Return the slice with Google's name for it, such as ``v5p-128`` (64 chips), ``v5e-256`` or ``v5litepod-256``.

    Raises:
        UserError: no such slice is on sale.
    """
    chip, _, number = name.partition("-")
    chip = "v5e" if chip == "v5litepod" else chip
    if chip not in _SHAPES:
        raise UserError(f"topology {name!r}: write it as a TPU and a number, such as v5e-256, v5p-128 or v6e-8")
    # The number in a slice's name counts cores.
    slices = {str(int(CHIPS[chip].cores.value) * math.prod(shape)): shape for shape in _SHAPES[chip]}
    if number not in slices:
        names = [f"{chip}-{valid}" for valid in slices]
        raise UserError(f"topology: no slice is called {name!r}{nearest(name, names)}; there are {', '.join(names)}")
    return Topology(name, CHIPS[chip], slices[number])


def detect_gpu_chip(device_name: str) -> Chip:
    """Return the chip that ``torch.cuda.get_device_name()`` names.

    Raises:
        UserError: the catalogue does not have it.
    """
    if device_name not in _GPU_NAMES:
        raise UserError(
            f"hardware.chip: the catalogue has no {device_name!r}; "
            f"set hardware.chip to the chip that MFU shall refer to, one of {', '.join(CHIPS)}"
        )
    return CHIPS[_GPU_NAMES[device_name]]


@functools.cache
def measure_cpu_peak() -> Chip:
    """Return this machine's CPU as a chip, its peak measured as float32 FLOP/s of a matmul on torch's threads.

    Measured once per process, in a few hundred milliseconds; the price is 0.
    """
    # It takes seconds to load, and the catalogue needs nothing of it.
    import torch

    size, repeats = 1024, 8
    a, b = torch.ones(size, size), torch.ones(size, size)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    threads = torch.get_num_threads()
    source = f"measured here: float32 matmul of {size} x {size}, best of {repeats}, {threads} threads"
    today = datetime.date.today().isoformat()
    return Chip(
        name="cpu (measured)",
        peak_flops=Sourced(2 * size**3 / min(seconds), source, today),
        price=Sourced(0.0, "the machine that is there", today),
    )


def cost(chip: Chip, num_chips: int, hours: float) -> float:
    """Dollars that ``num_chips`` chips cost for ``hours`` hours."""
    return num_chips * hours * chip.price.value


def performance_per_dollar(chip: Chip, emfu: float) -> float:
    """Achieved FLOP/s for each dollar per hour: peak x EMFU / price (multiply by 3600 for FLOPs per dollar).

    Raises:
        UserError: the chip's price is 0.
    """
    if not chip.price.value > 0:
        raise UserError(f"hardware.price: {chip.name} has no price; set it in dollars per chip-hour")
    return chip.peak_flops.value * emfu / chip.price.value
