"""Axes from device sets, against brute force over small meshes."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlab.attribute.axes import axes_of_groups, axes_of_pairs
from shardlab.hlo.groups import parse_replica_groups

ABC = {"a": 2, "b": 4, "c": 4}
SIZES = st.lists(st.sampled_from([1, 2, 3, 4, 6, 8]), min_size=1, max_size=5).filter(
    lambda sizes: math.prod(sizes) <= 64
)


@st.composite
def meshes_and_parts(draw: st.DrawFn) -> tuple[dict[str, int], list[tuple[str, int, int]]]:
    """A mesh and some disjoint parts (axis, pre, size) of it, one per axis at most."""
    sizes = draw(SIZES)
    mesh = {f"x{i}": size for i, size in enumerate(sizes)}
    parts = []
    for axis, size in mesh.items():
        pre = draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0]))
        part = draw(st.sampled_from([d for d in range(1, size // pre + 1) if size // pre % d == 0]))
        if part > 1:
            parts.append((axis, pre, part))
    return mesh, parts


def expand(mesh: dict[str, int], parts: Sequence[tuple[str, int, int]]) -> list[list[int]]:
    """Groups by definition: positions are together when all their coordinates agree outside of the parts."""
    by_rest: dict[tuple[object, ...], list[int]] = {}
    for position, coordinates in enumerate(itertools.product(*(range(size) for size in mesh.values()))):
        rest: list[object] = []
        for (axis, size), coordinate in zip(mesh.items(), coordinates, strict=True):
            pre, part = next(((p, s) for a, p, s in parts if a == axis), (1, 1))
            stride = size // (pre * part)
            rest.append((coordinate // (stride * part), coordinate % stride))
        by_rest.setdefault(tuple(rest), []).append(position)
    return list(by_rest.values())


@given(meshes_and_parts(), st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_products_of_parts_are_recognised(
    drawn: tuple[dict[str, int], list[tuple[str, int, int]]], shuffler: random.Random
) -> None:
    mesh, parts = drawn
    groups = expand(mesh, parts)
    for group in groups:
        shuffler.shuffle(group)
    shuffler.shuffle(groups)
    expected = tuple(a if size == mesh[a] else f"{a}:({pre}){size}" for a, pre, size in parts)
    assert axes_of_groups(groups, mesh).names == expected


@given(meshes_and_parts())
@settings(max_examples=100, deadline=None)
def test_the_same_parts_printed_with_mesh_axes(
    drawn: tuple[dict[str, int], list[tuple[str, int, int]]],
) -> None:
    mesh, parts = drawn
    if not parts:
        return
    axes = ",".join(f"'{axis}':({pre}){size}" for axis, pre, size in parts)
    printed = ",".join(f"'{axis}'={size}" for axis, size in mesh.items())
    groups = parse_replica_groups(f"mesh[{printed}] {{{axes}}}").groups
    assert sorted(map(sorted, groups)) == sorted(expand(mesh, parts))
    expected = tuple(a if size == mesh[a] else f"{a}:({pre}){size}" for a, pre, size in parts)
    assert axes_of_groups(groups, mesh).names == expected


@given(SIZES, st.data())
@settings(max_examples=100, deadline=None)
def test_a_named_answer_reproduces_the_groups(sizes: list[int], data: st.DataObject) -> None:
    """Random groups of equal size: whatever is named must expand to exactly these groups."""
    mesh = {f"x{i}": size for i, size in enumerate(sizes)}
    devices = math.prod(sizes)
    size = data.draw(st.sampled_from([d for d in range(1, devices + 1) if devices % d == 0]))
    order = data.draw(st.permutations(range(devices)))
    groups = [order[i : i + size] for i in range(0, devices, size)]
    names = axes_of_groups(groups, mesh).names
    if names is None:
        return
    parts = []
    for name in names:
        axis, _, part = name.partition(":(")
        pre, _, count = part.partition(")")
        parts.append((axis, int(pre or 1), int(count or mesh[axis])))
    if len({axis for axis, _, _ in parts}) == len(parts):
        assert sorted(map(sorted, groups)) == sorted(expand(mesh, parts))


@given(SIZES, st.data())
@settings(max_examples=100, deadline=None)
def test_pairs_give_the_union_of_axes_that_differ(sizes: list[int], data: st.DataObject) -> None:
    mesh = {f"x{i}": size for i, size in enumerate(sizes)}
    coordinates = list(itertools.product(*(range(size) for size in sizes)))
    position = st.integers(0, len(coordinates) - 1)
    pairs = data.draw(st.lists(st.tuples(position, position), max_size=8))
    differing = {
        axis
        for s, t in pairs
        for axis, x, y in zip(mesh, coordinates[s], coordinates[t], strict=True)
        if x != y
    }
    assert axes_of_pairs(pairs, mesh).names == tuple(axis for axis in mesh if axis in differing)


@pytest.mark.parametrize(
    ("groups", "mesh", "names"),
    [
        # every other pair of an 8-way axis: two parts of it
        ([[0, 1, 4, 5], [2, 3, 6, 7]], {"x": 8}, ("x:(1)2", "x:(4)2")),
        ([[0], [1]], {"x": 2}, ()),
        ([[0, 1]], {"one": 1, "x": 2}, ("x",)),
        ([], {"x": 2}, ()),
    ],
)
def test_named(groups: list[list[int]], mesh: dict[str, int], names: tuple[str, ...]) -> None:
    assert axes_of_groups(groups, mesh).names == names


@pytest.mark.parametrize(
    ("groups", "reason"),
    [
        ([[0, 5], [1, 4], [2, 3], [6, 7]], "groups vary over x, y"),  # not one shape
        ([[0, 7], [1, 6], [2, 5], [3, 4]], "groups vary over x, y"),  # not a product
        ([[1, 2], [3, 0], [5, 6], [7, 4]], "groups vary over y"),  # neighbours, but not aligned
        ([[1, 2], [5, 6]], "groups vary over y"),  # not aligned, and the others take no part
        ([[0, 1], [2, 6], [3, 7], [4, 5]], "groups vary over x, y"),  # each a part, but not the same
        ([[0, 1, 2], [3, 4, 5, 6, 7]], "different sizes (3, 5)"),
        ([[0, 1], [2, 3], [4, 5], [6], [7]], "different sizes (1, 2)"),
    ],
)
def test_irregular_groups_have_a_reason(groups: list[list[int]], reason: str) -> None:
    found = axes_of_groups(groups, {"x": 2, "y": 4})
    assert found.names is None
    assert reason in (found.reason or "")


def test_sixteen_thousand_devices() -> None:
    mesh = {"data": 16, "fsdp": 128, "tensor": 8}
    groups = parse_replica_groups("[128,128]<=[16,128,8]T(0,2,1)").groups
    assert axes_of_groups(groups, mesh).names == ("fsdp",)
