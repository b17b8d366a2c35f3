"""The drawing of a machine: every device has a cell of its own, and groups lie where the mesh puts them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from case_reports import analysis, collective

from shardlab.hardware.catalog import load_machine
from shardlab.report.html.busiest import busiest
from shardlab.report.html.mesh import Ground, closer, ground_of, mesh_blocks
from shardlab.report.html.parts import Chart, Prose

MACHINES = [
    "cpu:8",
    "h100:1x8",
    "h100:64x8",
    "h100:2048x8",
    "v5e:4x4",
    "v5e:4x4*2",
    "v5p:8x8x8",
    "tpu7x:4x4x4",
    "v4:4x4x4",
]


@pytest.mark.parametrize("spec", MACHINES)
def test_every_device_has_a_cell_inside_the_drawing(spec: str) -> None:
    machine = load_machine(spec)
    ground = ground_of(machine)
    boxes = [ground.box(device, "", "") for device in range(machine.num_devices)]
    assert len({(box.x, box.y) for box in boxes}) == machine.num_devices
    assert all(0 <= box.x < box.x + box.width <= ground.width for box in boxes)
    assert all(0 <= box.y < box.y + box.height <= ground.height for box in boxes)
    assert ground.blocks * ground.cells == machine.num_devices


def test_a_host_is_a_block_and_a_torus_is_drawn_plane_by_plane() -> None:
    """Device 12 of 8-GPU hosts is the fifth of host 1. On 8x8x8, x counts fastest: device 74 = (2, 1, 1)."""
    assert ground_of(load_machine("h100:64x8")).place(12) == (1, 0, 4)
    assert ground_of(load_machine("v5p:8x8x8")).place(74) == (1, 2, 1)


def test_only_as_much_is_drawn_as_a_group_needs() -> None:
    ground: Ground = ground_of(load_machine("h100:2048x8"))
    assert closer(ground, range(8)).shown == 16
    assert closer(ground, range(0, 16 * 8 * 50, 8 * 50)).shown == 751  # the last one is on host 750
    assert closer(ground, [0, 16383]).shown == 2048


def charts(mesh: dict[str, int], spec: str, **made_by: object) -> list[Chart]:
    found = replace(analysis(collective()), mesh=mesh, made_by=made_by)
    blocks = mesh_blocks(found, busiest(found), load_machine(spec), 1.0)
    return [block for block in blocks if isinstance(block, Chart)]


def test_each_axis_is_drawn_where_its_first_group_lies() -> None:
    """fsdp 4 x tensor 2 row-major on 4 hosts of 2: tensor stays in a host, fsdp joins one device of each."""
    fsdp, tensor = charts({"fsdp": 4, "tensor": 2}, "rtx4090+ethernet-10g:4x2", device_order="row-major")
    assert fsdp.title == "fsdp 4: 4 hosts, 1 device in each, over ethernet"
    assert tensor.title == "tensor 2: one host, over pcie"


def test_another_device_order_moves_the_groups() -> None:
    """The same mesh with its axes swapped on the hardware: now fsdp takes hosts 0 and 1 whole."""
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    fsdp, tensor = charts({"fsdp": 4, "tensor": 2}, "rtx4090+ethernet-10g:4x2", device_order=order)
    assert fsdp.title == "fsdp 4: 2 hosts, 2 devices in each, over ethernet"
    assert tensor.title == "tensor 2: 2 hosts, 1 device in each, over ethernet"


@pytest.mark.parametrize("mesh", [None, {"fsdp": 8}], ids=["no-mesh", "no-machine"])
def test_what_is_missing_is_said(mesh: dict[str, int] | None) -> None:
    found = replace(analysis(collective()), mesh=mesh)
    (only,) = mesh_blocks(found, busiest(found), None, None)
    assert isinstance(only, Prose)
    assert ("--axes" if mesh is None else "--on") in only.lines[0]


def test_an_unknown_device_order_is_said() -> None:
    found = replace(analysis(collective()), mesh={"fsdp": 8}, made_by={})
    last = mesh_blocks(found, busiest(found), load_machine("h100:1x8"), None)[-1]
    assert isinstance(last, Prose) and "not known" in last.lines[0]
