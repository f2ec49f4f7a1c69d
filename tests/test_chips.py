"""The catalogue against published values restated here, Google's slice names, detection, prices and the CPU's peak."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest

from gemma_xla.chips import (
    CHIPS,
    Sourced,
    cost,
    detect_gpu_chip,
    get_chip,
    measure_cpu_peak,
    performance_per_dollar,
    topology,
)
from gemma_xla.errors import UserError

# name: bf16 TFLOP/s, int8 TOP/s, GiB, GB/s, total link bandwidth one way in GB/s, dollars per hour
PUBLISHED = {
    "v5e": (197, 393, 16, 819, 180, 1.20),
    "v5p": (459, 918, 95, 2765, 540, 4.20),
    "v6e": (918, 1836, 32, 1638, 360, 2.70),
    "a100-80gb": (312, 624, 80, 2039, 300, 5.03),
    "h100": (989.4, 1978.9, 80, 3350, 450, 11.06),
    "h200": (989.4, 1978.9, 141, 4800, 450, 10.84),
}
# name: GB/s per chip between slices, FLOP in a cycle of all its matrix units, cores
TPUS = {"v5e": (3.125, 2**17, 1), "v5p": (6.25, 2**18, 2), "v6e": (12.5, 2**19, 1)}
TPU_ONLY = ("dcn_bandwidth", "clock", "cores")


def test_catalogue_holds_the_published_values():
    assert CHIPS.keys() == PUBLISHED.keys()
    for name, (bf16, int8, gib, bandwidth, links, price) in PUBLISHED.items():
        chip = get_chip(name)
        assert chip.name == name
        assert chip.peak_flops.value == bf16 * 1e12
        assert chip.peak_int8.value == int8 * 1e12
        assert chip.hbm_bytes.value == gib * 1024**3
        assert chip.hbm_bandwidth.value == bandwidth * 1e9
        assert chip.link_bandwidth.value * chip.num_links.value == links * 1e9
        assert chip.price.value == price


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_figure_names_its_source_and_date(name):
    chip = CHIPS[name]
    for field in dataclasses.fields(chip):
        figure = getattr(chip, field.name)
        if field.name == "name" or (field.name in TPU_ONLY and name not in TPUS):
            continue
        assert isinstance(figure, Sourced)
        assert figure.value > 0
        assert len(figure.source) > 20
        assert re.fullmatch(r"20\d\d-\d\d", figure.date)


@pytest.mark.parametrize("name", TPUS)
def test_what_only_tpus_have(name):
    dcn_bandwidth, flops_per_cycle, cores = TPUS[name]
    assert CHIPS[name].cores.value == cores
    assert CHIPS[name].dcn_bandwidth.value == dcn_bandwidth * 1e9
    assert CHIPS[name].clock.value * flops_per_cycle == pytest.approx(CHIPS[name].peak_flops.value, rel=0.003)


def test_int8_runs_at_twice_bf16():
    for chip in CHIPS.values():
        assert chip.peak_int8.value == pytest.approx(2 * chip.peak_flops.value, rel=0.003)


def test_unknown_chip_names_the_nearest_and_all():
    with pytest.raises(UserError) as error:
        get_chip("v5q")
    assert "'v5q' (did you mean 'v5" in str(error.value)
    assert all(name in str(error.value) for name in CHIPS)


@pytest.mark.parametrize(
    ("name", "chip", "num_chips", "shape"),
    [
        ("v5e-256", "v5e", 256, (16, 16)),
        ("v5litepod-256", "v5e", 256, (16, 16)),
        ("v5e-1", "v5e", 1, (1, 1)),
        ("v5e-8", "v5e", 8, (2, 4)),
        ("v5litepod-32", "v5e", 32, (4, 8)),
        ("v6e-8", "v6e", 8, (2, 4)),
        ("v6e-128", "v6e", 128, (8, 16)),
        ("v5p-8", "v5p", 4, (2, 2, 1)),
        ("v5p-128", "v5p", 64, (4, 4, 4)),
        ("v5p-256", "v5p", 128, (4, 4, 8)),
        ("v5p-2048", "v5p", 1024, (8, 8, 16)),
        ("v5p-12288", "v5p", 6144, (16, 16, 24)),
    ],
)
def test_slice_names(name, chip, num_chips, shape):
    found = topology(name)
    assert (found.name, found.chip.name, found.num_chips, found.shape) == (name, chip, num_chips, shape)
    assert found.num_chips == math.prod(shape)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("v5e-250", "did you mean 'v5e-256'?"),
        ("v5e-512", "there are v5e-1, v5e-4, v5e-8, v5e-16, v5e-32, v5e-64, v5e-128, v5e-256"),
        ("v5p-4", "there are v5p-8, v5p-16, v5p-32"),
        ("v5p", "there are v5p-8"),
        ("v4-8", "such as v5e-256, v5p-128 or v6e-8"),
        ("h100-8", "such as v5e-256, v5p-128 or v6e-8"),
        ("v5e-016", "there are v5e-1"),
    ],
)
def test_unknown_slices_name_the_way_out(name, hint):
    with pytest.raises(UserError) as error:
        topology(name)
    assert repr(name) in str(error.value)
    assert hint in str(error.value)


@pytest.mark.parametrize(
    ("device", "name"),
    [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-80GB", "a100-80gb"), ("NVIDIA H200", "h200")],
)
def test_gpus_are_detected(device, name):
    assert detect_gpu_chip(device) is CHIPS[name]


@pytest.mark.parametrize(
    "device",
    [
        "NVIDIA A100-SXM4-40GB",
        "NVIDIA H100 PCIe",
        "NVIDIA GH200 480GB",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "Tesla T4",
    ],
)
def test_other_gpus_are_not_mistaken_for_them(device):
    with pytest.raises(UserError, match=r"hardware\.chip") as error:
        detect_gpu_chip(device)
    assert device in str(error.value)


def test_cpu_peak_is_measured_once_and_sane():
    chip = measure_cpu_peak()
    assert chip.name == "cpu (measured)"
    assert 1e9 <= chip.peak_flops.value <= 1e14
    assert "measured here" in chip.peak_flops.source
    assert chip.price.value == 0
    assert measure_cpu_peak() is chip


def test_price_override_changes_only_the_price():
    chip = get_chip("v5e").with_price(0.48)
    assert chip.price.value == 0.48
    assert chip.price.source == "set by the user"
    assert dataclasses.replace(chip, price=CHIPS["v5e"].price) == CHIPS["v5e"]
    assert CHIPS["v5e"].price.value == 1.20


def test_cost_and_performance_per_dollar():
    # 256 chips for half a day at 1.20.
    assert cost(get_chip("v5e"), num_chips=256, hours=12) == pytest.approx(3686.4)
    assert cost(get_chip("v5e").with_price(0.5), 2, 3) == 3.0
    assert performance_per_dollar(get_chip("v5e"), emfu=0.6) == pytest.approx(98.5e12)
    with pytest.raises(UserError, match=r"hardware\.price"):
        performance_per_dollar(measure_cpu_peak(), emfu=0.5)
