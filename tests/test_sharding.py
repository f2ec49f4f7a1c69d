"""The mesh and the partition rules: each parameter matches one rule, each rule is used, nothing is cut unevenly."""

import pytest
import torch

from gemma_xla.config import MeshSection
from gemma_xla.errors import UserError
from gemma_xla.model.config import preset
from gemma_xla.model.gemma import Gemma
from gemma_xla.sharding import (
    ACTIVATION_RULES,
    PARAMETER_RULES,
    MeshShape,
    Rule,
    check_heads,
    check_slices,
    gathered,
    match,
    resolve_mesh,
    resolve_spec,
)


def _shapes(config):
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Gemma(config).named_parameters()}


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("gemma-2b", MeshShape(fsdp=256)),
        ("gemma-2b", MeshShape(data=2, fsdp=64, tensor=2)),
        ("gemma-7b", MeshShape(fsdp=256)),
        ("gemma-7b", MeshShape(fsdp=16, tensor=16)),
        ("gemma-tiny", MeshShape(fsdp=4)),
    ],
)
def test_every_matrix_is_split_over_the_whole_mesh(name, mesh):
    """FSDP's promise: no device holds more than its share of the matrices."""
    config = preset(name)
    shapes = _shapes(config)
    specs = match(PARAMETER_RULES, shapes, mesh, config)
    assert specs.keys() == shapes.keys()
    for parameter, spec in specs.items():
        ways = 1
        for entry in spec:
            ways *= mesh.ways(entry)
        whole_heads = config.num_key_value_heads % mesh.tensor and ("k_proj" in parameter or "v_proj" in parameter)
        wanted = mesh.fsdp if whole_heads else mesh.fsdp * mesh.tensor
        assert ways == (1 if parameter.endswith("norm.weight") else wanted), parameter


def test_gathering_leaves_only_the_tensor_axis():
    assert gathered((("tensor", "fsdp"), None)) == ("tensor", None)
    assert gathered(("fsdp", "tensor")) == (None, "tensor")
    assert gathered((None,)) == (None,)


def test_key_value_heads_stay_whole_where_the_tensor_axis_does_not_divide_them():
    assert resolve_spec((("kv", "fsdp"), None), MeshShape(tensor=2), preset("gemma-7b")) == (("tensor", "fsdp"), None)
    assert resolve_spec((("kv", "fsdp"), None), MeshShape(tensor=2), preset("gemma-2b")) == ("fsdp", None)
    assert resolve_spec((None, "kv"), MeshShape(tensor=2), preset("gemma-2b")) == (None, None)


def test_every_activation_rule_names_a_module():
    import re

    with torch.device("meta"):
        names = [name for name, _ in Gemma(preset("gemma-test")).named_modules()]
    for rule in ACTIVATION_RULES:
        assert any(re.fullmatch(rule.pattern, name) for name in names), rule.pattern


def test_a_parameter_without_a_rule_is_named():
    shapes = _shapes(preset("gemma-test")) | {"model.extra.weight": (4, 4)}
    with pytest.raises(UserError, match=r"'model\.extra\.weight' must match exactly one"):
        match(PARAMETER_RULES, shapes, MeshShape(), preset("gemma-test"))


def test_a_parameter_with_two_rules_is_named():
    rules = (*PARAMETER_RULES, Rule(r".*up_proj\.weight", (None, None)))
    with pytest.raises(UserError, match=r"'model\.layers\.0\.mlp\.up_proj\.weight' .* matches .*up_proj"):
        match(rules, _shapes(preset("gemma-test")), MeshShape(), preset("gemma-test"))


def test_a_rule_that_matches_nothing_is_named():
    rules = (*PARAMETER_RULES, Rule(r"model\.typo", (None,)))
    with pytest.raises(UserError, match="typo"):
        match(rules, _shapes(preset("gemma-test")), MeshShape(), preset("gemma-test"))


def test_a_rule_of_another_rank_is_named():
    rules = (*PARAMETER_RULES[:-1], Rule(PARAMETER_RULES[-1].pattern, (None, None)))
    with pytest.raises(UserError, match="has 1 dimensions, its partition rule 2"):
        match(rules, _shapes(preset("gemma-test")), MeshShape(), preset("gemma-test"))


def test_a_mesh_that_does_not_divide_the_model_is_refused():
    with pytest.raises(UserError, match=r"splits dimension 0 of 'model\..*' \(512\) into 7 parts"):
        match(PARAMETER_RULES, _shapes(preset("gemma-test")), MeshShape(fsdp=7), preset("gemma-test"))
    with pytest.raises(UserError, match="mesh.tensor is 3, which does not divide the model's 4 attention heads"):
        check_heads(preset("gemma-test"), MeshShape(tensor=3))


@pytest.mark.parametrize(
    ("section", "devices", "expected"),
    [
        (MeshSection(), 8, MeshShape(1, 8, 1)),
        (MeshSection(data=-1, fsdp=4), 8, MeshShape(2, 4, 1)),
        (MeshSection(data=2, fsdp=2, tensor=-1), 8, MeshShape(2, 2, 2)),
        (MeshSection(data=1, fsdp=1, tensor=1), 1, MeshShape(1, 1, 1)),
    ],
)
def test_the_free_axis_takes_what_remains(section, devices, expected):
    assert resolve_mesh(section, devices) == expected


@pytest.mark.parametrize(
    ("section", "devices", "message"),
    [
        (MeshSection(fsdp=3), 8, "fsdp=3 x tensor=1 does not fit 8 device"),
        (MeshSection(data=3), 8, "does not fit 8 device"),
        (MeshSection(data=-1), 8, "data and fsdp are both -1"),
        (MeshSection(fsdp=0), 8, "mesh.fsdp is 0"),
        (MeshSection(tensor=-2), 8, "mesh.tensor is -2"),
        (MeshSection(fsdp=16), 8, "does not fit 8 device"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(section, devices, message):
    with pytest.raises(UserError, match=message):
        resolve_mesh(section, devices)


class TestSlices:
    """The data axis alone may run from slice to slice."""

    @pytest.mark.parametrize(
        ("mesh", "slices"),
        [
            (MeshShape(1, 8, 1), [0] * 8),
            (MeshShape(2, 4, 1), [0] * 4 + [1] * 4),
            (MeshShape(4, 2, 1), [3] * 4 + [1] * 4),
            (MeshShape(4, 2, 2), [0] * 8 + [1] * 8),
        ],
    )
    def test_each_holds_a_whole_model(self, mesh, slices):
        check_slices(mesh, slices)

    def test_the_mesh_must_say_so(self):
        with pytest.raises(UserError, match=r"mesh.data is 1, but the devices are 2 slices, .*; set mesh.data=2 "):
            check_slices(MeshShape(1, 8, 1), [0] * 4 + [1] * 4)

    @pytest.mark.parametrize("slices", [[0, 1] * 4, [0] * 3 + [1] * 5, [0, 0, 1, 1, 1, 1, 0, 0]])
    def test_devices_must_be_ordered_by_them(self, slices):
        with pytest.raises(UserError, match="mesh: .* slice by slice"):
            check_slices(MeshShape(2, 4, 1), slices)
