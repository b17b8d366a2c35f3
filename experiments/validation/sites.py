"""INTELLECT-1: the link rates that its synchronisation times imply; a calibration, not a validation."""

from __future__ import annotations

from collections.abc import Iterator

from shardlab.cost.wire import wire_of
from shardlab.hardware.catalog import load_machine


def implied_rates(machine: str = "intellect1") -> Iterator[tuple[str, float]]:
    """(row of INTELLECT-1's table 2, bytes per second of each node's link that its time implies).

    10e9 int8 values in a ring over 14 nodes: each sends 2 · 13/14 of them.
    """
    nodes = load_machine(machine).hosts
    for row, seconds in (("USA", 103), ("USA + Europe", 382), ("global", 469)):
        wire = wire_of(
            kind="all-reduce",
            operand_bytes=10**10,
            result_bytes=10**10,
            groups=(tuple(range(nodes)),),
            pairs=(),
        )
        yield row, float(wire.wire_bytes) / seconds


def implied_rate_lines() -> Iterator[str]:
    """The same, to read."""
    yield "INTELLECT-1, table 2: the link rate of a node that each row implies; calibration, not validation"
    for row, rate in implied_rates():
        yield f"  {row}: {rate * 8 / 1e9:.2f} Gbit/s"
