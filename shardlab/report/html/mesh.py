"""The mesh on its machine: where the devices of a group sit, axis by axis, and what its links carry."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from shardlab.analysis import Analysis, CollectiveRow, axes_key
from shardlab.hardware.machine import Machine
from shardlab.hardware.placement import core_on_chip, slice_index, spanning_level, torus_coords
from shardlab.report.figures import NONE, most
from shardlab.report.html.busiest import Busiest
from shardlab.report.html.charts import Box, plan_of
from shardlab.report.html.communication import amount_text, link_table, sent
from shardlab.report.html.parts import Block, Chart, Prose
from shardlab.report.page import Cell, Column, Line, Table, cell
from shardlab.units import format_seconds

NEAR, FAR, FIRST, EMPTY = "var(--near)", "var(--far)", "var(--first)", "var(--cell)"
_ASPECT = 8.0  # of a drawing, about
_MOST_CELLS, _MOST_BLOCKS = 1024, 512  # above, the ground is drawn more coarsely
_FEWEST_BLOCKS = 16  # of a machine that has so many
_TALLEST = 8  # devices of a host above each other
_GAP = 0.35


@dataclass(frozen=True, slots=True)
class Ground:
    """How a machine is drawn: blocks of cells, in rows. A block is a host (an NVLink domain), or a plane of a
    torus; its cells are devices. noun: what a block is called. blocks: of the machine; the first `shown` of
    them are drawn."""

    machine: Machine
    noun: str
    blocks: int
    across: int
    down: int
    shown: int

    @property
    def per_row(self) -> int:
        """Blocks beside each other, so that the drawing is about eight times as wide as high."""
        beside = math.sqrt(_ASPECT * self.shown * (self.down + _GAP) / (self.across + _GAP))
        rows = max(1, math.ceil(self.shown / min(math.ceil(beside), self.shown)))
        return math.ceil(self.shown / rows)

    @property
    def meaning(self) -> str:
        """What a block is."""
        if not self.machine.torus:
            return f"each block is a {self.noun} of {self.cells} devices"
        each = "each block is a plane of the torus, x to the right and y downwards"
        return f"{each}, z from block to block" if len(self.machine.torus) > 2 else each

    @property
    def cells(self) -> int:
        """Devices of a block."""
        return self.across * self.down

    @property
    def width(self) -> float:
        """In cells, gaps included."""
        return self.per_row * (self.across + _GAP)

    @property
    def height(self) -> float:
        """In cells, gaps included."""
        return math.ceil(self.shown / self.per_row) * (self.down + _GAP)

    def corner(self, block: int) -> tuple[float, float]:
        """Where a block begins."""
        row, column = divmod(block, self.per_row)
        return column * (self.across + _GAP), row * (self.down + _GAP)

    def place(self, device: int) -> tuple[int, int, int]:
        """Block, column and row of a device."""
        machine = self.machine
        if machine.torus:
            x, y, *rest = (*torus_coords(machine, device), 0)
            plane = slice_index(machine, device) * (machine.torus[2] if len(machine.torus) > 2 else 1)
            return plane + rest[0], x * machine.chip.xla_devices + core_on_chip(machine, device), y
        block, inside = divmod(device, machine.num_devices // self.blocks)
        return block, inside // self.down, inside % self.down

    def box(self, device: int, colour: str, text: str) -> Box:
        """The cell of a device."""
        return self.cell(*self.place(device), colour, text)

    def cell(self, block: int, column: int, row: int, colour: str, text: str) -> Box:
        """One cell of a block."""
        x, y = self.corner(block)
        return Box(x + column + 0.05, y + row + 0.05, 0.9, 0.9, colour, text)

    def name(self, device: int) -> str:
        """`device 12, host 1`, with coordinates on a torus."""
        if not self.machine.torus:
            return f"device {device}, {self.noun} {self.place(device)[0]}"
        where = "device {} at ({})".format(device, ", ".join(map(str, torus_coords(self.machine, device))))
        return where + (f", slice {slice_index(self.machine, device)}" if self.machine.slices > 1 else "")


def ground_of(machine: Machine) -> Ground:
    """The layout of a machine's drawing."""
    if machine.torus:
        x, y, *rest = machine.torus
        across, down, noun = x * machine.chip.xla_devices, y, "plane"
        blocks = machine.slices * math.prod(rest)
    else:
        size = machine.domains[0].size if len(machine.domains) > 1 else machine.num_devices
        blocks, noun = machine.num_devices // size, "host" if machine.hosts > 1 else "machine"
        noun = "NVLink domain" if blocks != machine.hosts and machine.hosts > 1 else noun
        down = min(size, _TALLEST if blocks > 1 else 4)
        across = math.ceil(size / down)
    return Ground(machine, noun, blocks, across, down, blocks)


def closer(ground: Ground, group: Sequence[int]) -> Ground:
    """Only as many blocks as a group needs, and a few around it."""
    last = max(ground.place(device)[0] for device in group)
    needed = max(_FEWEST_BLOCKS, last + 1)
    return ground if needed > ground.blocks // 2 else replace(ground, shown=needed)


def mesh_blocks(
    analysis: Analysis, device: Busiest, machine: Machine | None, step_s: float | None
) -> tuple[Block, ...]:
    """The links that are hot, then each axis: where the group of the mesh's first device sits."""
    mesh = analysis.mesh
    if not mesh:
        return (Prose(title="", lines=("No mesh was given: --axes or --mesh names its axes.",)),)
    if machine is None or math.prod(mesh.values()) > machine.num_devices:
        return (Prose(title="", lines=("No machine was given: --on says where its devices sit.",)),)
    devices, note = _device_order(analysis, machine)
    ground = ground_of(machine)
    groups = {axis: _group(mesh, axis, devices) for axis in mesh}
    tables = (*link_table(device, step_s), _axes_table(device, ground, groups))
    charts = tuple(_axis_chart(axis, group, ground) for axis, group in groups.items() if len(group) > 1)
    notes = (Prose(title="", lines=(note,)),) if note else ()
    return (*tables, *charts, *notes)


def _device_order(analysis: Analysis, machine: Machine) -> tuple[Sequence[int], str]:
    """The device at each mesh position, and what had to be assumed."""
    order = analysis.made_by.get("device_order")
    if isinstance(order, list):
        return order, ""
    known = order == "row-major" or machine.emulated
    return range(machine.num_devices), "" if known else "The device order is not known: drawn row-major."


def _group(mesh: Mapping[str, int], axis: str, devices: Sequence[int]) -> list[int]:
    """The devices along one axis, at the first position of all others."""
    sizes = list(mesh.values())
    stride = math.prod(sizes[list(mesh).index(axis) + 1 :])
    return [devices[number * stride] for number in range(mesh[axis])]


def _axes_table(device: Busiest, ground: Ground, groups: Mapping[str, list[int]]) -> Table:
    columns = (
        Column("mesh axis"), Column("size", "right"), Column("a group spans"), Column("slowest link"),
        Column("each device sends", "right"), Column("time", "right"),
        Column("devices of the first group", keep=False),
    )  # fmt: skip
    over = sent(device.rows, lambda row: axes_key(row.axes))
    rows = tuple(
        (
            cell(axis, "strong"),
            cell(f"{len(group)}"),
            cell(_span_text(ground, group)),
            cell(_tier(ground.machine, group)),
            cell(amount_text(over[axis]) if axis in over and most(over[axis]) else NONE),
            cell(_time_text(device.rows, axis)),
            _devices_cell(group),
        )
        for axis, group in groups.items()
    )
    caption = device.caption(
        "collectives over this axis alone, launches and steps included in their time; those over several "
        "axes stand in the table above"
    )
    return Table(title="Where each mesh axis lies", columns=columns, rows=rows, caption=caption)


def _time_text(collectives: Sequence[CollectiveRow], axis: str) -> str:
    rows = [row for row in collectives if axes_key(row.axes) == axis and row.executions[1] and row.wire_bytes]
    times = [None if row.time_s is None else row.time_s * (row.executions[1] or 0) for row in rows]
    known = [time for time in times if time is not None]
    if not rows:
        return NONE
    return format_seconds(sum(known) if len(known) == len(times) else None)


def _span_text(ground: Ground, group: Sequence[int]) -> str:
    blocks = {ground.place(device)[0] for device in group}
    if ground.machine.torus:
        lying = zip(*(torus_coords(ground.machine, device) for device in group), strict=True)
        varying = [
            f"{name} ({len(set(values))} of {extent})"
            for name, values, extent in zip("xyz", lying, ground.machine.torus, strict=False)
            if len(set(values)) > 1
        ]
        slices = len({slice_index(ground.machine, device) for device in group})
        over = [f"{slices} slices"] if slices > 1 else []
        return ", ".join([*over, *varying]) or "one chip"
    each = math.ceil(len(group) / len(blocks))
    if len(blocks) == 1:
        return f"one {ground.noun}"
    return f"{len(blocks):,} {ground.noun}s, {each} device{'' if each == 1 else 's'} in each"


def _tier(machine: Machine, group: Sequence[int]) -> str:
    level = spanning_level(machine, group)
    return NONE if level is None else machine.domains[level].tier


def _devices_cell(group: Sequence[int]) -> Cell:
    shown = ", ".join(map(str, group[:6])) + (", …" if len(group) > 6 else "")
    return (Line(shown, code=True),)


def _axis_chart(axis: str, group: Sequence[int], whole: Ground) -> Chart:
    ground = closer(whole, group)
    inner = spanning_level(ground.machine, group) == 0 and len(ground.machine.domains) > 1
    colour = NEAR if inner else FAR
    boxes = _background(ground)
    boxes += [
        ground.box(device, colour if number else FIRST, f"{axis} {number}: {ground.name(device)}")
        for number, device in enumerate(group)
    ]
    span, tier = _span_text(ground, group), _tier(ground.machine, group)
    part = (
        f"; the first {ground.shown:,} of {ground.blocks:,} are drawn" if ground.shown < ground.blocks else ""
    )
    return Chart(
        title=f"{axis} {len(group)}: {span}, over {tier}",
        alt=f"The first group of {axis} on {ground.machine.spec}: {span}.",
        wide=plan_of(boxes, ground.width, ground.height),
        caption=f"{ground.meaning}{part}; filled: the devices that "
        f"one group of {axis} joins, the first one marked apart",
    )


def _background(ground: Ground) -> list[Box]:
    """Every device where there are few, else every block, else every row of blocks."""
    if ground.shown * ground.cells <= _MOST_CELLS:
        places = ((block, at) for block in range(ground.shown) for at in range(ground.cells))
        return [ground.cell(block, *divmod(at, ground.down), EMPTY, "") for block, at in places]
    if ground.shown <= _MOST_BLOCKS:
        corners = (ground.corner(block) for block in range(ground.shown))
        return [Box(x, y, ground.across, ground.down, EMPTY) for x, y in corners]
    rows = math.ceil(ground.shown / ground.per_row)
    return [Box(0, row * (ground.down + _GAP), ground.width, ground.down, EMPTY) for row in range(rows)]
