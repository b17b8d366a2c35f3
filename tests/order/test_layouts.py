"""Which device orders are tried: every one of its kind, each once, and no more than asked for."""

from __future__ import annotations

import math
from itertools import permutations, product

import pytest

from shardlab.hardware.catalog import load_machine
from shardlab.order.layouts import Dim, Layout, candidates, factored, machine_dims, nested


def by_name(layouts: list[Layout]) -> dict[str, tuple[int, ...]]:
    return {layout.name: layout.device_ids for layout in layouts}


@pytest.mark.parametrize(
    ("machine", "wanted"),
    [
        ("h100:2x4", [("nvlink", 4), ("infiniband", 2)]),
        ("h100:1x8", [("nvlink", 8)]),
        ("v5e:4x2", [("x", 4), ("y", 2)]),
        ("v5p:4x4x8", [("x", 4), ("y", 4), ("z", 8)]),
        ("tpu7x:2x2x4", [("core", 2), ("x", 2), ("y", 2), ("z", 4)]),
        ("cpu:8", [("loopback", 8)]),
    ],
)
def test_dimensions_of_a_machine_are_innermost_first(machine: str, wanted: list[tuple[str, int]]) -> None:
    assert [(dim.name, dim.extent) for dim in machine_dims(load_machine(machine))] == wanted


def test_every_nesting_by_hand() -> None:
    # Position (d, t) of data 2 x tensor 3. Tensor innermost: 3 d + t; data innermost: 2 t + d.
    assert by_name(list(nested({"data": 2, "tensor": 3}))) == {
        "nested data > tensor": (0, 1, 2, 3, 4, 5),
        "nested tensor > data": (0, 2, 4, 1, 3, 5),
    }


def test_axes_of_one_have_no_place_to_take() -> None:
    assert len(list(nested({"data": 2, "one": 1, "tensor": 3}))) == 2
    assert [layout.device_ids for layout in nested({"one": 1})] == [(0,)]


def test_axes_over_torus_dimensions_by_hand() -> None:
    """a = 4 and b = 4 on 4 x 4. Whole dimensions: 2 ways. Both in halves of both: two nestings of each
    dimension, 4 ways. With x fastest, id = x + 4 y."""
    found, complete = factored({"a": 4, "b": 4}, (Dim("x", 4, True), Dim("y", 4, True)), 100)
    layouts = by_name(list(found))
    assert complete
    assert len(layouts) == len(set(layouts.values())) == 6
    assert layouts["a on y, b on x"] == tuple(range(16))
    assert layouts["a on x, b on y"] == tuple(a + 4 * b for a in range(4) for b in range(4))
    halves = "a on 2 of x and 2 of y, b on 2 of x and 2 of y"
    block = [ay * 8 + ax * 2 + by * 4 + bx for ay, ax, by, bx in product(range(2), repeat=4)]
    assert layouts[f"{halves} (x: a > b; y: a > b)"] == tuple(block)


def test_devices_of_one_domain_are_alike() -> None:
    """On 2 hosts of 4 GPUs a = 2 is across hosts or inside one; nesting makes no difference."""
    found, complete = factored({"a": 2, "b": 4}, (Dim("nvlink", 4, False), Dim("infiniband", 2, False)), 100)
    names = [layout.name for layout in found]
    assert complete
    assert names == [
        "a on infiniband, b on nvlink",
        "a on 2 of nvlink, b on 2 of nvlink and infiniband",
    ]


@pytest.mark.parametrize(
    ("a", "b", "extents"), [(6, 2, (6, 2)), (6, 2, (4, 3)), (4, 3, (2, 2, 3)), (8, 8, (4, 4, 4))], ids=str
)
def test_all_factorings_are_found(a: int, b: int, extents: tuple[int, ...]) -> None:
    """Against brute force: what one of two axes takes of each dimension leaves the rest to the other."""
    dims = tuple(Dim(f"d{i}", extent, False) for i, extent in enumerate(extents))
    found, complete = factored({"a": a, "b": b}, dims, 100)
    brute = [
        part
        for part in product(*(range(1, extent + 1) for extent in extents))
        if math.prod(part) == a and not any(extent % n for extent, n in zip(extents, part, strict=True))
    ]
    assert complete
    assert len({layout.device_ids for layout in found}) == len(brute) > 0


def test_candidates_are_orders_of_the_devices_each_once_row_major_first() -> None:
    machine = load_machine("v5p:4x4x4")
    layouts, complete = candidates({"a": 4, "b": 2, "c": 8}, machine, range(64), 1000)
    ids = [layout.device_ids for layout in layouts]
    assert complete
    assert ids[0] == tuple(range(64))
    assert len(set(ids)) == len(ids)
    assert all(sorted(order) == list(range(64)) for order in ids)


def test_the_search_is_bounded_and_says_so() -> None:
    machine = load_machine("v5p:8x8x8")
    mesh = {name: 2 for name in "abcdefghi"}
    layouts, complete = candidates(mesh, machine, range(512), 40)
    assert not complete
    assert 20 < len(layouts) <= 40
    assert any(layout.name.startswith("a on") for layout in layouts)


def test_a_part_of_the_machine_keeps_its_devices() -> None:
    machine = load_machine("h100:2x4")
    layouts, _ = candidates({"a": 2, "b": 2}, machine, (1, 3, 5, 7), 100)
    assert [layout.device_ids for layout in layouts] == [(1, 3, 5, 7), (1, 5, 3, 7)]


def test_nestings_of_three_axes_are_six() -> None:
    names = [layout.name for layout in nested({"a": 2, "b": 3, "c": 5})]
    assert names == [f"nested {' > '.join(order)}" for order in permutations("abc")]
