"""HLO ids and megascale device ids as positions in the user's mesh."""

from __future__ import annotations

import math

import pytest

from shardlab.attribute.members import MEGASCALE_STRIDE, Placement, megascale_members, members, place
from shardlab.errors import ParseError, UserError
from shardlab.hlo.module import Instruction, Module
from shardlab.hlo.reader import parse


def module(
    header: str, groups: str = "{{0,1}}", extra: str = "channel_id=1, use_global_device_ids=true"
) -> Module:
    (found,) = parse(
        f"HloModule m{header}\n\nENTRY %main {{\n  %x = f32[4]{{0}} parameter(0)\n"
        f"  ROOT %r = f32[8]{{0}} all-gather(%x), {extra}, replica_groups={groups}, dimensions={{0}}\n}}\n"
    )
    return found


def collective(found: Module) -> Instruction:
    return found.computations["main"].instructions["r"]


def placed(found: Module, mesh: dict[str, int] | None, device_ids: list[int] | None = None) -> Placement:
    return place(found, mesh, device_ids, [collective(found)])


def test_in_slice_groups_hold_in_every_slice() -> None:
    found = module(", num_partitions=2")
    where = placed(found, {"dcn": 3, "data": 2})
    assert (where.slices, where.num_devices) == (3, 6)
    assert members(collective(found), where).groups == ((0, 1), (2, 3), (4, 5))


def test_slices_need_not_be_the_leading_axis_when_the_devices_are_known() -> None:
    # mesh data=2 x dcn=2: device ids 0, 1 are slice 0 and 2, 3 slice 1, dcn fastest
    found = module(", num_partitions=2")
    where = placed(found, {"data": 2, "dcn": 2}, [0, 2, 1, 3])
    assert members(collective(found), where).groups == ((0, 2), (1, 3))


def test_ids_of_the_megascale_runtime_are_understood() -> None:
    found = module(", num_partitions=2")
    device_ids = [MEGASCALE_STRIDE, 2 * MEGASCALE_STRIDE, MEGASCALE_STRIDE + 1, 2 * MEGASCALE_STRIDE + 1]
    where = placed(found, {"data": 2, "dcn": 2}, device_ids)
    assert members(collective(found), where).groups == ((0, 2), (1, 3))
    assert megascale_members("{1,2}x{0:1}", where).groups == ((0, 1), (2, 3))


@pytest.mark.parametrize(
    "target", ["{1,2}x{0:3}", "{{100000,200000},{100001,200001},{100002,200002},{100003,200003}}"]
)
def test_transfers_between_slices_without_a_device_order(target: str) -> None:
    where = placed(module(", num_partitions=4"), {"dcn": 2, "data": 4})
    found = megascale_members(target, where)
    assert sorted(found.groups) == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert found.assumed == ""


def test_shuffled_slices_are_exact_with_the_device_order_and_assumed_without() -> None:
    target = "{{100003,200000},{100001,200002},{100000,200001},{100002,200003}}"
    found = module(", num_partitions=4")
    mesh = {"dcn": 2, "data": 4}
    exact = megascale_members(target, placed(found, mesh, [3, 1, 0, 2, 4, 6, 5, 7]))
    assumed = megascale_members(target, placed(found, mesh))
    assert sorted(exact.groups) == sorted(assumed.groups) == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert (exact.assumed, bool(assumed.assumed)) == ("", True)


def test_pairs_between_slices() -> None:
    where = placed(module(", num_partitions=2"), {"dcn": 2, "data": 2})
    found = megascale_members("{{100000->200000},{200001->100001}}", where)
    assert found.pairs == ((0, 2), (3, 1))


@pytest.mark.parametrize("target", ["", "{}", "{{a,b}}", "{1,2}x{0:99999999999}", "{1,2}x{x}"])
def test_unreadable_targets(target: str) -> None:
    where = placed(module(", num_partitions=2"), {"dcn": 2, "data": 2})
    with pytest.raises(ParseError, match="megascale target"):
        megascale_members(target, where)


@pytest.mark.parametrize(
    ("header", "groups", "extra", "mesh", "counts"),
    [
        # text from before November 2023: the header says nothing
        ("", "{{0,1,2,3},{4,5,6,7}}", "channel_id=1, use_global_device_ids=true", None, (1, 8)),
        ("", "{{0,1,2,3},{4,5,6,7}}", "channel_id=1, use_global_device_ids=true", {"x": 8}, (1, 8)),
        ("", "{{0,1,2,3},{4,5,6,7}}", "metadata={}", None, (8, 1)),
        ("", "{{0}}", "channel_id=1, use_global_device_ids=true", None, (1, 1)),
        (", replica_count=2", "{{0,1}}", "metadata={}", None, (2, 1)),
        (", replica_count=2, num_partitions=4", "{{0,1}}", "metadata={}", None, (2, 4)),
    ],
)
def test_how_many_devices(
    header: str, groups: str, extra: str, mesh: dict[str, int] | None, counts: tuple[int, int]
) -> None:
    where = placed(module(header, groups, extra), mesh)
    assert (where.replicas, where.partitions) == counts
    assert where.num_devices == math.prod(counts)


@pytest.mark.parametrize(
    ("header", "mesh", "said"),
    [
        (", num_partitions=8", {"data": 3, "model": 2}, ("data=3 x model=2 has 6 devices", "compiled for 8")),
        (", num_partitions=8", {"data": 4}, ("has 4 devices", "compiled for 8")),
        (", replica_count=2, num_partitions=4", {"data": 16}, ("has 16 devices", "compiled for 8")),
        ("", {"data": 1}, ("has 1 devices", "compiled for 2")),
        # 28 = 14 x 2, but no leading axes (2, 2 x 2) make 14 slices
        (
            ", num_partitions=2",
            {"data": 2, "model": 2, "x": 7},
            ("data=2 x model=2 x x=7 has 28 devices", "compiled for 2"),
        ),
    ],
)
def test_a_mesh_of_another_size_is_refused_and_both_numbers_named(
    header: str, mesh: dict[str, int], said: tuple[str, str]
) -> None:
    with pytest.raises(UserError) as raised:
        placed(module(header), mesh)
    assert all(part in str(raised.value) for part in said)


@pytest.mark.parametrize(
    ("device_ids", "said"),
    [
        ([0, 1, 2], "3 device ids for 4"),
        ([0, 1, 0, 3], "device 0 is listed twice"),
        ([0, 1, 2, 9], "not 2 slices of 2"),
    ],
)
def test_device_ids_that_do_not_fit(device_ids: list[int], said: str) -> None:
    with pytest.raises(UserError, match=said):
        placed(module(", num_partitions=2"), {"dcn": 2, "data": 2}, device_ids)


def test_an_id_that_does_not_exist_is_an_error_at_its_line() -> None:
    found = module(", num_partitions=2", "{{0,5}}")
    with pytest.raises(ParseError, match="id 5") as raised:
        members(collective(found), placed(found, {"data": 2}))
    assert raised.value.line == 5
