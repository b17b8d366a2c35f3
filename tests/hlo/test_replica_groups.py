"""Replica groups against brute force, and what their ids mean (XLA: collective_op_group_mode.cc)."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlab.errors import ParseError
from shardlab.hlo.groups import (
    MAX_IDS,
    AxisRef,
    flattened_groups,
    flattened_pairs,
    group_mode,
    parse_replica_groups,
    parse_source_target_pairs,
)
from shardlab.hlo.module import Instruction, Shape


def brute_force_position(coordinates: tuple[int, ...], sizes: list[int]) -> int:
    position = 0
    for coordinate, size in zip(coordinates, sizes, strict=True):
        position = position * size + coordinate
    return position


@st.composite
def meshes(draw: st.DrawFn) -> tuple[list[str], list[int]]:
    sizes = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4))
    alphabet = st.characters(blacklist_characters="'", blacklist_categories=["Cs"])
    names = draw(
        st.lists(
            st.text(alphabet, min_size=1, max_size=6), min_size=len(sizes), max_size=len(sizes), unique=True
        )
    )
    return names, sizes


@st.composite
def sub_axes(draw: st.DrawFn) -> tuple[list[str], list[int], list[tuple[int, int, int]]]:
    """A mesh and references (axis, pre, size), at most one per axis, in any order."""
    names, sizes = draw(meshes())
    chosen = draw(
        st.permutations(range(len(sizes))).flatmap(lambda p: st.integers(0, len(p)).map(lambda n: p[:n]))
    )
    refs = []
    for axis in chosen:
        size = draw(st.sampled_from([d for d in range(1, sizes[axis] + 1) if sizes[axis] % d == 0]))
        rest = sizes[axis] // size
        pre = draw(st.sampled_from([d for d in range(1, rest + 1) if rest % d == 0]))
        refs.append((axis, pre, size))
    return names, sizes, refs


def brute_force_groups(
    sizes: list[int], refs: list[tuple[int, int, int]], ids: list[int]
) -> set[tuple[int, ...]]:
    """Group every device with those that differ only in the listed parts of coordinates, in listed order."""
    groups: dict[tuple[object, ...], list[tuple[tuple[int, ...], int]]] = {}
    for coordinates in itertools.product(*map(range, sizes)):
        fixed: list[object] = list(coordinates)
        parts = []
        for axis, pre, size in refs:
            inner = sizes[axis] // (pre * size)
            coordinate = coordinates[axis]
            parts.append(coordinate // inner % size)
            fixed[axis] = (coordinate // (inner * size), coordinate % inner)
        device = ids[brute_force_position(coordinates, sizes)]
        groups.setdefault(tuple(fixed), []).append((tuple(parts), device))
    return {tuple(device for _, device in sorted(members)) for members in groups.values()}


def axis_text(name: str, sizes: list[int], ref: tuple[int, int, int]) -> str:
    axis, pre, size = ref
    return f"'{name}'" if size == sizes[axis] else f"'{name}':({pre}){size}"


@settings(deadline=None)
@given(sub_axes(), st.data())
def test_mesh_notation_against_brute_force(
    drawn: tuple[list[str], list[int], list[tuple[int, int, int]]], data: st.DataObject
) -> None:
    names, sizes, refs = drawn
    count = math.prod(sizes)
    kind = data.draw(st.sampled_from(["iota", "list", "transposed"]))
    ids, ids_text = list(range(count)), ""
    if kind == "list":
        ids = data.draw(st.permutations(range(count)))
        ids_text = f", device_ids=({','.join(map(str, ids))})"
    elif kind == "transposed":
        split = data.draw(st.sampled_from([d for d in range(1, count + 1) if count % d == 0]))
        ids = [row * (count // split) + column for column in range(count // split) for row in range(split)]
        ids_text = f", device_ids=([{split},{count // split}]T(1,0))"
    mesh = ",".join(f"'{name}'={size}" for name, size in zip(names, sizes, strict=True))
    axes = ",".join(axis_text(names[ref[0]], sizes, ref) for ref in refs)
    read = parse_replica_groups(f"mesh[{mesh}]{ids_text} {{{axes}}}")
    assert set(read.groups) == brute_force_groups(sizes, refs, ids)
    assert len(read.groups) * len(read.groups[0]) == count
    assert read.notation == "V3"
    assert read.mesh == tuple(zip(names, sizes, strict=True))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_iota_notation_against_brute_force(dims: list[int], data: st.DataObject) -> None:
    perm = data.draw(st.permutations(range(len(dims))))
    count = math.prod(dims)
    members = data.draw(st.sampled_from([d for d in range(1, count + 1) if count % d == 0]))
    moved = [dims[axis] for axis in perm]
    order = []
    for coordinates in itertools.product(*map(range, moved)):
        original = [0] * len(dims)
        for place, axis in enumerate(perm):
            original[axis] = coordinates[place]
        order.append(brute_force_position(tuple(original), dims))
    expected = tuple(tuple(order[i : i + members]) for i in range(0, count, members))
    text = f"[{count // members},{members}]<=[{','.join(map(str, dims))}]T({','.join(map(str, perm))})"
    assert parse_replica_groups(text).groups == expected


@given(
    st.permutations(range(12)),
    st.lists(st.integers(1, 4), min_size=1, max_size=6),
    st.sampled_from([",", ", ", " ,\n"]),
)
def test_list_notation_reads_back(order: list[int], lengths: list[int], comma: str) -> None:
    groups, rest = [], list(order)
    for length in lengths:
        if rest:
            groups.append(tuple(rest[:length]))
            rest = rest[length:]
    text = "{" + comma.join("{" + comma.join(map(str, group)) + "}" for group in groups) + "}"
    assert parse_replica_groups(text).groups == tuple(groups)


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{}", ()),
        ("{{}}", ()),
        ("[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['data'=2,'model'=4] {'model':(2)2}", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("mesh['data'=2,'model'=4] {'model':(1)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("mesh['a'=2,'b'=4] {1}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("mesh['b'=8] {'b':(4)2,'b':(1)2}", ((0, 4, 1, 5), (2, 6, 3, 7))),
        ("mesh['a'=3] {}", ((0,), (1,), (2,))),
        ("mesh[] {}", ((0,),)),
        ("maximal_mesh[device_id=5] {}", ((5,),)),
    ],
)
def test_notations(text: str, groups: tuple[tuple[int, ...], ...]) -> None:
    assert parse_replica_groups(text).groups == groups


def test_axes_are_kept_as_printed() -> None:
    read = parse_replica_groups("mesh['data'=2,'model'=4] {'model':(2)2,'data'}")
    assert read.axes == (AxisRef(name="model", pre=2, size=2), AxisRef(name="data"))


@pytest.mark.parametrize(
    "text",
    [
        "", "0", "{", "{{0,1}", "{{0,1}{2,3}}", "{{0,1},}", "{{0,0}}", "{{0,1},{1,2}}", "{{-1}}", "{{0,a}}",
        "[2,4]<=[9]", "[2,4]<=[2,4]T(1,1)", "[2,4]<=[2,4]T(0)", "[0,4]<=[0]", "[8]<=[8]", "[2,4]<=",
        "[2,2,2]<=[8]",
        f"[{MAX_IDS * 2},1]<=[{MAX_IDS * 2}]", "mesh['a'=2", "mesh['a'=2]", "mesh['a'=2] {'b'}",
        "mesh['a'=0] {'a'}",
        "mesh['a'=6] {'a':(4)2}", "mesh['a'=4] {'a':(2)4}", "mesh['a'=4] {'a':(1)0}",
        "mesh['a'=4] {'a':(0)2}", "mesh['a'=4] {'a':(1)4,'a':(2)2}",
        "mesh['a'=2] {'a','a'}",
        "mesh['a'=2], device_ids=(0) {'a'}", "mesh['a'=2], device_ids=(1,1) {'a'}", "mesh['a'=2] {'a'} x",
        "mesh['a'=2], ids=(0,1) {'a'}", "mesh['a'=99999999,'b'=99999999] {'a'}", "mesh['a=2] {'a'}",
    ],
)  # fmt: skip
def test_broken_groups_are_refused(text: str) -> None:
    with pytest.raises(ParseError):
        parse_replica_groups(text)


def collective(opcode: str, **attributes: str) -> Instruction:
    return Instruction(name="c", opcode=opcode, shape=Shape("f32"), attributes=attributes)


MODES = [
    # opcode, channel id, use_global_device_ids, groups in the text (2 replicas x 3 partitions), flattened
    ("all-reduce", None, None, "{{0,1}}", ((0, 3), (1, 4), (2, 5))),
    ("all-reduce", None, None, "{}", ((0, 3), (1, 4), (2, 5))),
    ("all-reduce", "1", None, "{{0,1}}", ((0, 1, 2, 3, 4, 5),)),
    ("all-reduce", "1", None, "{{0},{1}}", ((0, 1, 2), (3, 4, 5))),
    ("all-reduce", "1", None, "{}", ((0, 1, 2, 3, 4, 5),)),
    ("all-gather-start", "1", "true", "{{0,4},{2,5},{1,3}}", ((0, 4), (2, 5), (1, 3))),
    ("all-to-all", "1", None, "{{2,0}}", ((2, 0), (5, 3))),
    ("all-to-all", "1", None, "{}", ((0, 1, 2), (3, 4, 5))),
    ("all-to-all", None, None, "{{1,0}}", ((3, 0), (4, 1), (5, 2))),
    ("collective-broadcast", "1", None, "{{1,2}}", ((1, 2), (4, 5))),
]


@pytest.mark.parametrize(("opcode", "channel", "use_global", "text", "flattened"), MODES)
def test_group_modes(
    opcode: str,
    channel: str | None,
    use_global: str | None,
    text: str,
    flattened: tuple[tuple[int, ...], ...],
) -> None:
    given_attributes = {"replica_groups": text, "channel_id": channel, "use_global_device_ids": use_global}
    instruction = collective(opcode, **{key: value for key, value in given_attributes.items() if value})
    assert flattened_groups(instruction, num_replicas=2, num_partitions=3) == flattened


def test_groups_left_out_mean_everything() -> None:
    assert flattened_groups(collective("all-reduce", channel_id="1"), 1, 4) == ((0, 1, 2, 3),)


def test_pairs_follow_the_mode() -> None:
    partitions = collective("collective-permute", channel_id="1", source_target_pairs="{{0,1},{2,0}}")
    replicas = collective("collective-permute", source_target_pairs="{{0,1}}")
    assert flattened_pairs(partitions, 2, 3) == ((0, 1), (2, 0), (3, 4), (5, 3))
    assert flattened_pairs(replicas, 2, 3) == ((0, 3), (1, 4), (2, 5))


def test_global_ids_need_a_channel() -> None:
    with pytest.raises(ParseError, match="without channel_id"):
        group_mode(collective("all-reduce", use_global_device_ids="true"))


def test_empty_groups_of_global_ids_are_invalid() -> None:
    with pytest.raises(ParseError, match="empty"):
        flattened_groups(collective("all-reduce", channel_id="1", use_global_device_ids="true"), 1, 4)


@pytest.mark.parametrize("text", ["{{0,9}}", "[1,16]<=[16]"])
def test_id_that_does_not_exist(text: str) -> None:
    instruction = collective("all-reduce", channel_id="1", use_global_device_ids="true", replica_groups=text)
    with pytest.raises(ParseError, match="only 8 exist"):
        flattened_groups(instruction, 1, 8)


@pytest.mark.parametrize("text", ["{{0}}", "{{0,1,2}}", "{{0,1}", "0,1", "{{0,-1}}"])
def test_broken_pairs_are_refused(text: str) -> None:
    with pytest.raises(ParseError):
        parse_source_target_pairs(text)


def test_lists_of_nine_thousand_devices() -> None:
    text = "{" + ",".join(f"{{{2 * i},{2 * i + 1}}}" for i in range(4500)) + "}"
    groups = parse_replica_groups(text).groups
    assert groups[4499] == (8998, 8999)
    assert parse_replica_groups(text).groups is groups


def test_errors_name_the_instruction_and_its_line() -> None:
    given_attributes = {"channel_id": "1", "use_global_device_ids": "true", "replica_groups": "{{0,1}"}
    instruction = Instruction(
        name="ar.7", opcode="all-reduce", shape=Shape("f32"), attributes=given_attributes, line=42
    )
    with pytest.raises(ParseError, match=r"ar\.7: not replica groups") as caught:
        flattened_groups(instruction, 1, 8)
    assert (caught.value.line, caught.value.column) == (42, 1)
