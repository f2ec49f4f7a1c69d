"""Slices by name, and meshes over them."""

from __future__ import annotations

import pytest

from gemma_xla.config_file import validate
from gemma_xla.errors import UserError
from gemma_xla.plan.slices import hardware


def config(**mesh):
    tree = {
        "output_dir": "x",
        "data": {"train": [{"path": "x.txt"}], "seq_len": 64},
        "train": {"steps": 1, "batch_size_per_device": 1},
        "mesh": mesh,
    }
    return validate(tree, "test")


def test_the_number_of_a_v5p_counts_cores():
    found = hardware(config(), "v5p-128")
    assert (found.num_chips, found.mesh.fsdp, found.slice.shape) == (64, 64, (4, 4, 4))


def test_several_slices_are_replicas_along_data():
    found = hardware(config(data=4, fsdp=-1), "2xv5e-16")
    assert (found.count, found.num_chips) == (2, 32)
    assert (found.mesh.data, found.mesh.fsdp) == (4, 8)
    assert (found.slice_mesh.data, found.slice_mesh.fsdp) == (2, 8)


def test_the_config_names_it_and_sets_the_price():
    section = config().hardware.model_copy(update={"price": 2.5, "topology": "v5e-4"})
    found = hardware(config().model_copy(update={"hardware": section}))
    assert (found.name, found.chip.price.value) == ("v5e-4", 2.5)


@pytest.mark.parametrize(("name", "hosts"), [("v5e-1", 1), ("v5e-8", 1), ("v5e-16", 4), ("v5p-8", 1), ("v5p-128", 16)])
def test_hosts(name, hosts):
    assert hardware(config(), name).num_hosts == hosts


@pytest.mark.parametrize(
    ("mesh", "name", "message"),
    [
        ({}, None, "hardware.topology is missing"),
        ({}, "v5e-255", "no slice is called 'v5e-255' \\(did you mean 'v5e-256'\\?\\); there are v5e-1, v5e-4"),
        ({}, "h100-8", "write it as a TPU and a number"),
        ({}, "0xv5e-4", "give a number of slices from 1"),
        ({}, "2xv5e-4", "mesh.data is 1, but each of the 2 slices holds a whole model; set mesh.data=2"),
        ({"fsdp": 3}, "v5e-4", "topology v5e-4: mesh: data=1 x fsdp=3 x tensor=1 does not fit 4 device"),
    ],
)
def test_what_cannot_be_is_one_clear_line(mesh, name, message):
    with pytest.raises(UserError, match=message) as error:
        hardware(config(**mesh), name)
    assert "\n" not in str(error.value)
