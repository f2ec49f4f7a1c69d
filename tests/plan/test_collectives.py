"""The price of transfers, against sums done by hand; the grid of a slice and who shares its links."""

from __future__ import annotations

import pytest

from gemma_xla.chips import CHIPS
from gemma_xla.errors import UserError
from gemma_xla.plan.collectives import Fabric, Transfer, read_groups, read_pairs
from gemma_xla.plan.hlo import Instruction, arrays
from gemma_xla.plan.torus import Torus, Way, torus
from gemma_xla.sharding import MeshShape

GB = 1e9


def instruction(attributes: str, opcode: str = "all-gather") -> Instruction:
    return Instruction("one", opcode, "f32[]", [], "", attributes)


def price(chip: str, mesh: MeshShape, opcode: str, attributes: str, operand: str) -> Transfer:
    fabric = Fabric(mesh, torus(CHIPS[chip], mesh.num_devices), CHIPS[chip].link_bandwidth.value)
    return fabric.price(instruction(attributes, opcode), arrays(operand))


@pytest.mark.parametrize(
    ("attributes", "groups"),
    [
        (", replica_groups={{0,1},{2,3}}, dimensions={0}", [(0, 1), (2, 3)]),
        (", replica_groups={}, to_apply=%add", [(0, 1, 2, 3)]),
        (", replica_groups=[2,2]<=[4], dimensions={1}", [(0, 1), (2, 3)]),
        (", replica_groups=[2,2]<=[2,2]T(1,0)", [(0, 2), (1, 3)]),
        # 2 x 3 x 4, the last axis first: groups differ in the middle one.
        (", replica_groups=[8,3]<=[2,3,4]T(2,0,1)",
         [(0, 4, 8), (12, 16, 20), (1, 5, 9), (13, 17, 21), (2, 6, 10), (14, 18, 22), (3, 7, 11), (15, 19, 23)]),
    ],
)  # fmt: skip
def test_groups(attributes, groups):
    assert read_groups(instruction(attributes), 4) == groups


def test_groups_in_an_unknown_way_are_an_error():
    with pytest.raises(ValueError, match="replica_groups"):
        read_groups(instruction(", replica_groups=@mesh<x>"), 4)


def test_pairs():
    assert read_pairs(instruction(", channel_id=1, source_target_pairs={{0,1},{10,0}}")) == [(0, 1), (10, 0)]


@pytest.mark.parametrize(
    ("mesh", "groups", "axis"),
    [
        (MeshShape(2, 4, 2), [(0, 1), (2, 3)], "tensor"),
        (MeshShape(2, 4, 2), [(0, 2, 4, 6), (1, 3, 5, 7)], "fsdp"),
        (MeshShape(2, 4, 2), [(0, 8), (1, 9)], "data"),
        (MeshShape(2, 4, 2), [tuple(range(0, 16, 2))], "data+fsdp"),
        (MeshShape(2, 4, 2), [tuple(range(16))], "data+fsdp+tensor"),
        (MeshShape(1, 16, 1), [tuple(range(16))], "fsdp"),
        (MeshShape(1, 16, 1), [(0,), (1,)], ""),
    ],
)
def test_axes(mesh, groups, axis):
    assert Fabric(mesh, torus(CHIPS["v5e"], 16), 1.0).axis(groups) == axis


@pytest.mark.parametrize(
    ("chip", "count", "shape", "is_ring"),
    [
        ("v5e", 256, (16, 16), (True, True)),
        ("v5e", 128, (8, 16), (False, True)),
        ("v5e", 16, (4, 4), (False, False)),
        ("v6e", 1, (1, 1), (False, False)),
        ("v5p", 64, (4, 4, 4), (True, True, True)),
        ("v5p", 128, (4, 4, 8), (True, True, True)),
        ("v5p", 16, (2, 2, 4), (False, False, False)),
        ("v5p", 4, (2, 2, 1), (False, False, False)),
    ],
)
def test_grids(chip, count, shape, is_ring):
    assert torus(CHIPS[chip], count) == Torus(shape, is_ring)


def test_a_slice_that_is_not_on_sale():
    with pytest.raises(UserError, match="no slice of 7 v5e chips"):
        torus(CHIPS["v5e"], 7)


POD = Torus((16, 16), (True, True))


@pytest.mark.parametrize(
    ("group", "ways"),
    [
        (range(256), [Way(16, True, 1), Way(16, True, 1)]),
        # A row, and half of one, which is a line.
        (range(16, 32), [Way(16, True, 1)]),
        (range(8), [Way(8, False, 1)]),
        # A column; every fourth of its chips, whose links three other groups use too.
        (range(3, 256, 16), [Way(16, True, 1)]),
        (range(0, 256, 64), [Way(4, True, 4)]),
        # Four rows; every second chip of a row's half.
        (range(64), [Way(16, True, 1), Way(4, False, 1)]),
        (range(0, 8, 2), [Way(4, False, 2)]),
        # No grid: one link.
        ((0, 1, 17), [Way(3, False, 1)]),
        ((0, 1, 3), [Way(3, False, 1)]),
    ],
)
def test_the_axes_a_group_can_use(group, ways):
    assert POD.ways(group) == ways


@pytest.mark.parametrize(("way", "links"), [(Way(16, True, 1), 2), (Way(8, False, 1), 1), (Way(4, True, 4), 0.5)])
def test_links(way, links):
    assert way.links == links


def test_two_chips_have_one_link():
    assert Torus((2, 2), (False, False)).ways(range(4)) == [Way(2, False, 1), Way(2, False, 1)]
    assert sum(way.links for way in Torus((2, 2), (False, False)).ways(range(4))) == 2


@pytest.mark.parametrize(
    ("pairs", "load"),
    [
        ([], 0),
        ([(i, (i + 1) % 16) for i in range(16)], 1),
        # Two steps around the ring: two messages on each link. Half way round, eight.
        ([(i, (i + 2) % 16) for i in range(16)], 2),
        ([(i, (i + 8) % 16) for i in range(16)], 8),
        # Backwards, the links' other direction.
        ([(i, (i - 1) % 16) for i in range(16)] + [(i, (i + 1) % 16) for i in range(16)], 1),
        # From row to row.
        ([(i, (i + 16) % 256) for i in range(256)], 1),
        # All to one: two links lead to it along the second axis, and what comes by one of them is half of a column.
        ([(i * 16, 0) for i in range(1, 16)], 8),
    ],
)
def test_the_busiest_link(pairs, load):
    assert POD.busiest_link(pairs) == load


def test_a_shift_on_a_line_goes_all_the_way_back():
    line = Torus((4, 4), (False, False))
    assert line.busiest_link([(0, 1), (1, 2), (2, 3), (3, 0)]) == 1
    assert line.busiest_link([(3, 0), (2, 0), (0, 1)]) == 2


def test_all_gather_over_a_whole_pod():
    # A shard of 4 MB on each of 256 chips: 1.024 GB in all, over four links of 45 GB/s.
    found = price("v5e", MeshShape(1, 256), "all-gather", ", replica_groups=[1,256]<=[256]", "bf16[2000000]")
    assert (found.kind, found.axis, found.num_bytes) == ("all-gather", "fsdp", 1_024_000_000)
    assert found.seconds == pytest.approx(1.024 * 255 / 256 / 180)


def test_all_gather_in_a_small_slice_has_no_rings():
    found = price("v5e", MeshShape(1, 16), "all-gather", ", replica_groups=[1,16]<=[16]", "bf16[2000000]")
    assert found.seconds == pytest.approx(0.064 * 15 / 16 / 90)


def test_gathering_along_one_axis_of_a_pod_takes_two_links():
    mesh = MeshShape(16, 16)
    for attributes, axis in ((", replica_groups=[16,16]<=[256]", "fsdp"),
                             (", replica_groups=[16,16]<=[16,16]T(1,0)", "data")):  # fmt: skip
        found = price("v5e", mesh, "all-gather-start", attributes, "f32[1000000]{0:T(1024)}")
        assert (found.kind, found.axis, found.num_bytes) == ("all-gather", axis, 64_000_000)
        assert found.seconds == pytest.approx(0.064 * 15 / 16 / 90)


def test_all_reduce_is_reduce_scatter_and_all_gather():
    groups = ", replica_groups=[1,64]<=[64]"
    tensors = "bf16[16384,2048]"
    size = 2 * 16384 * 2048 / GB
    reduced = price("v5p", MeshShape(1, 64), "all-reduce", groups, tensors)
    scattered = price("v5p", MeshShape(1, 64), "reduce-scatter", groups, tensors)
    assert (reduced.num_bytes, scattered.num_bytes) == (size * GB, size * GB)
    assert scattered.seconds == pytest.approx(size * 63 / 64 / 540)
    assert reduced.seconds == pytest.approx(2 * scattered.seconds)


def test_all_operands_of_a_collective_count():
    found = price("v5p", MeshShape(1, 64), "all-reduce", ", replica_groups={}", "(f32[10], bf16[20], f32[])")
    assert found.num_bytes == 84


def test_all_to_all():
    groups = ", replica_groups=[16,16]<=[256]"
    # 1 MB on each of 16 chips around a ring: an eighth of 16 MB, over one link in one direction.
    found = price("v5e", MeshShape(16, 16), "all-to-all", groups, "s8[1000000]")
    assert found.num_bytes == 16_000_000
    assert found.seconds == pytest.approx(0.016 / 8 / 45)
    # On a line of 4: a quarter of 4 MB.
    found = price("v5e", MeshShape(4, 4), "all-to-all", ", replica_groups=[4,4]<=[16]", "s8[1000000]")
    assert found.seconds == pytest.approx(0.004 / 4 / 45)
    # Along every fourth chip of a ring of 16, whose links four groups share: an eighth of 4 MB, four times.
    found = price("v5e", MeshShape(4, 64), "all-to-all", ", replica_groups=[64,4]<=[4,64]T(1,0)", "s8[1000000]")
    assert (found.axis, found.seconds) == ("data", pytest.approx(4 * 0.004 / 8 / 45))


def test_collective_permute():
    pairs = ", source_target_pairs={{0,1},{1,2},{2,3},{3,0}}"
    found = price("v5e", MeshShape(1, 16), "collective-permute-start", pairs, "s8[1000000]")
    assert (found.kind, found.axis, found.num_bytes) == ("collective-permute", "fsdp", 1_000_000)
    assert found.seconds == pytest.approx(0.001 / 45)


def test_a_group_of_one_takes_no_time():
    assert price("v5e", MeshShape(1, 4), "all-gather", ", replica_groups=[4,1]<=[4]", "f32[8]").seconds == 0
