"""A model made from stored weights is the same on any mesh, down to the bit, and trains like any other."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from gemma_xla import backend
from gemma_xla.backend import Backend, fill_in_rows, part_of
from gemma_xla.hf import HfReader, export
from gemma_xla.model.config import preset
from gemma_xla.model.gemma import Gemma, init_parameter
from gemma_xla.sharding import AXES, MeshShape
from gemma_xla.train.build import build_model, initial, stored
from tests.hf.conftest import Weights
from tests.worker import run, run_in_process

CONFIG = preset("gemma-test").replace(initializer_range=0.1)
DTYPES = ["float32", "bfloat16", "float16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model folder in bfloat16 shards."""
    model = Gemma(CONFIG)
    for name, parameter in model.named_parameters():
        init_parameter(name, parameter, CONFIG, 1)
    # Norms that differ from each other.
    values = {n: p.data + torch.arange(p.numel()).view(p.shape) / 1000 for n, p in model.named_parameters()}
    path = tmp_path_factory.mktemp("stored") / "model"
    return export(Weights(values), CONFIG, path, dtype="bfloat16", max_shard_size="50KB")


@functools.cache
def plain(folder: Path) -> dict:
    return run({"from": str(folder)})


def check(folder: Path, devices: int, mesh: list[int], **options: int) -> None:
    expected = plain(folder)
    found = run_in_process({"from": str(folder), "devices": devices, "mesh": mesh, **options})
    assert found["start"] == expected["start"]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert found["grad_norms"] == pytest.approx(expected["grad_norms"], rel=1e-5)
    _, fsdp, tensor = mesh
    # The parameter, both moments and the gradient, as if the values had been random.
    assert found["parts"] == [[[96 // (fsdp * tensor), 48]] * (fsdp * tensor)] * 4
    assert found["compilations"] == [1, 0, 0, 0]


@pytest.mark.xla
def test_four_devices_start_from_the_same_bits_as_one(folder):
    """The one case of the default suite: parts split along one axis and repeated along another, made float32 there."""
    check(folder, 4, [2, 1, 2], wide=0)


@pytest.mark.xla
@pytest.mark.parametrize(
    ("devices", "mesh"), [(1, [1, 1, 1]), (4, [1, 4, 1]), (8, [2, 2, 2]), (4, [4, 1, 1]), (4, [1, 1, 4])]
)
def test_any_mesh_starts_from_the_same_bits(folder, devices, mesh):
    check(folder, devices, mesh)


def test_what_is_in_the_folder_is_in_the_model(folder):
    cpu = Backend(torch.device("cpu"))
    reader = HfReader(folder)
    model, specs = build_model(CONFIG, cpu, stored(reader, cpu), "sdpa")
    assert list(specs) == [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, torch.nn.Parameter)
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, reader.read(name).float()), name


def test_a_prefix_selects_among_the_stored_tensors(folder):
    cpu = Backend(torch.device("cpu"))
    model, _ = build_model(CONFIG, cpu, initial(CONFIG, cpu, 3), "sdpa")
    held = {f"model/{name}": parameter.detach() for name, parameter in model.named_parameters()}
    again, _ = build_model(CONFIG, cpu, stored(Weights(held), cpu, "model/"), "sdpa")
    assert all(torch.equal(p, held[f"model/{name}"]) for name, p in again.named_parameters())
    assert all(p.data_ptr() != held[f"model/{name}"].data_ptr() for name, p in again.named_parameters())


@pytest.mark.parametrize("size", ["5GB", "50KB"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_import_and_export_give_equal_bytes(folder, tmp_path, dtype, size):
    options = {"dtype": dtype, "max_shard_size": size}
    first = export(HfReader(folder), CONFIG, tmp_path / "first", **options)
    cpu = Backend(torch.device("cpu"))
    model, _ = build_model(CONFIG, cpu, stored(HfReader(first), cpu), "sdpa")
    second = export(Weights(model.state_dict()), CONFIG, tmp_path / "second", **options)
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {p.name: p.read_bytes() for p in second.iterdir()}


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 4, 1), (2, 1, 2), (2, 2, 2), (3, 2, 4)])
def test_the_part_of_each_device(sizes):
    mesh = MeshShape(**dict(zip(AXES, sizes, strict=True)))
    shape = (96, 48)
    entries = [None, *AXES, ("tensor", "fsdp"), ("data", "fsdp")]
    for spec in itertools.product(entries, entries):
        for device in range(mesh.num_devices):
            at = np.unravel_index(device, sizes)
            for entry, part, size in zip(spec, part_of(shape, spec, mesh, device), shape, strict=True):
                axes = [AXES.index(name) for name in ((entry,) if isinstance(entry, str) else entry or ())]
                ways = [sizes[axis] for axis in axes]
                number = np.ravel_multi_index([at[axis] for axis in axes], ways) if axes else 0
                expected = np.split(np.arange(size), np.prod(ways, dtype=int))[number]
                assert range(size)[part] == range(expected[0], expected[-1] + 1)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7,), (33, 30), (3, 200), (5, 4, 3)])
def test_a_tensor_is_filled_some_rows_at_a_time(monkeypatch, device, dtype, shape):
    monkeypatch.setattr(backend, "STAGED", 100)
    values, copied = torch.randn(shape).to(dtype), []

    def copy_to(out, index):
        copied.append(out.numel())
        out.copy_(values[index])

    placed = torch.empty(shape, device=device)
    fill_in_rows(placed, copy_to, dtype, tuple(slice(0, size) for size in shape))
    assert torch.equal(placed.cpu(), values.float())
    assert max(copied) <= max(100, values[0].numel())
    assert sum(copied) == values.numel()
    # A part of it, as a device that holds no more than that.
    part = (slice(1, 3), *(slice(1, size) for size in shape[1:]))
    held = torch.empty([at.stop - at.start for at in part], device=device)
    fill_in_rows(held, copy_to, dtype, part)
    assert torch.equal(held.cpu(), values[part].float())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_kept_in_the_type_that_is_asked_for(device, dtype):
    """Of frozen weights in bfloat16 nothing wider exists, not even on the way."""
    values, asked = torch.randn(33, 30).to(dtype), []

    def copy_to(out, index):
        asked.append(out.dtype)
        out.copy_(values[index])

    placed = Backend(torch.device(device)).place_from((33, 30), (None, None), copy_to, dtype, out=torch.bfloat16)
    assert placed.dtype == torch.bfloat16
    assert torch.equal(placed.cpu(), values.bfloat16())
    assert set(asked) == {torch.bfloat16}


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_model_is_placed_on_a_gpu(dtype):
    values = torch.randn(33, 30).to(dtype)
    placed = Backend(torch.device("cuda")).place_from(
        (33, 30), (None, None), lambda out, index: out.copy_(values[index]), dtype
    )
    assert placed.is_cuda
    assert torch.equal(placed.cpu(), values.float())
