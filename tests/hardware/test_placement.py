"""Where devices sit. Torus coordinates are those that libtpu 0.0.50's topologies print."""

from __future__ import annotations

import pytest

from shardlab.hardware.catalog import load_machine
from shardlab.hardware.placement import core_on_chip, domain_index, slice_index, spanning_level, torus_coords

LIBTPU = [  # (machine, device id, coords, core): printed by get_topology_desc(...).devices
    ("v5e:8x4", 1, (1, 0), 0),
    ("v5e:8x4", 8, (0, 1), 0),
    ("v5e:4x8", 4, (0, 1), 0),
    ("v5p:4x4x8", 5, (1, 1, 0), 0),
    ("v4:4x4x4", 4, (0, 1, 0), 0),
    ("tpu7x:4x4x4", 1, (0, 0, 0), 1),
    ("tpu7x:4x4x4", 3, (1, 0, 0), 1),
    ("tpu7x:4x4x4", 8, (0, 1, 0), 0),
]


@pytest.mark.parametrize(("spec", "device", "coords", "core"), LIBTPU)
def test_coordinates_are_those_of_libtpu(spec: str, device: int, coords: tuple[int, ...], core: int) -> None:
    machine = load_machine(spec)
    assert torus_coords(machine, device) == coords
    assert core_on_chip(machine, device) == core


def test_coordinates_start_again_in_each_slice() -> None:
    machine = load_machine("v5e:8x8*2")
    assert torus_coords(machine, 64 + 9) == torus_coords(machine, 9) == (1, 1)
    assert (slice_index(machine, 63), slice_index(machine, 64)) == (0, 1)


def test_every_chip_has_its_own_place() -> None:
    machine = load_machine("v5p:4x4x8")
    places = {torus_coords(machine, device) for device in range(128)}
    assert places == {(x, y, z) for x in range(4) for y in range(4) for z in range(8)}


def test_gpus_count_host_by_host() -> None:
    machine = load_machine("h100:8x8")
    assert [domain_index(machine, device, 0) for device in (0, 7, 8, 63)] == [0, 0, 1, 7]
    assert {domain_index(machine, device, 1) for device in range(64)} == {0}
    assert torus_coords(machine, 5) == ()


@pytest.mark.parametrize(
    ("devices", "level"),
    [
        pytest.param(range(8, 16), 0, id="one host"),
        pytest.param([7, 8], 1, id="neighbours on two hosts"),
        pytest.param(range(0, 64, 8), 1, id="one GPU of each host"),
        pytest.param([3, 3], None, id="one device spans nothing"),
    ],
)
def test_the_innermost_level_that_holds_a_group(devices: list[int], level: int | None) -> None:
    assert spanning_level(load_machine("h100:8x8"), devices) == level


@pytest.mark.parametrize("device", [-1, 64])
def test_devices_that_the_machine_does_not_have(device: int) -> None:
    with pytest.raises(ValueError, match="has devices 0 to 63"):
        domain_index(load_machine("h100:8x8"), device, 0)
