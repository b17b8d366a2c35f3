"""Traffic that another device order keeps off the slow link: XLA:GPU programs of golden/audit, two hosts."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
from bare_links import bare
from order_programs import program

from shardlab.analysis import attribute
from shardlab.audit import Finding, audit_parts
from shardlab.audit import placed as rule
from shardlab.hardware.catalog import load_machine
from shardlab.order import Orders, orders

GOLDEN = Path(__file__).parents[1] / "golden" / "audit"
MESH = {"x": 4, "y": 2}
X_WITHIN_HOSTS = (0, 4, 1, 5, 2, 6, 3, 7)  # position (x, y) -> device 4 y + x


def placed(
    name: str, machine: str | None = "h100:2x4", device_ids: tuple[int, ...] | None = None
) -> tuple[Finding, ...]:
    on = bare(machine) if machine else None
    parts = tuple(attribute(GOLDEN / f"{name}.hlo", MESH, device_ids, on))
    return tuple(one for one in audit_parts(parts, on) if one.rule == "slow-tier-by-order")


def test_an_axis_across_hosts_that_fits_into_one() -> None:
    """f32[64,256] over x on 4 trips, row-major: two of four in each host, so 1/3 of 3 · 64 KiB crosses."""
    (finding,) = placed("gather_in_loop.gpu")
    crossing = Fraction(4 * 65_536)
    assert (finding.instruction, finding.axes) == ("all-gather-start", ("x",))
    assert finding.wire_bytes == (crossing, crossing)
    assert "go over infiniband; the device order nested y > x" in finding.evidence
    # 4 trips of 3/2 · 64 KiB at 50 GB/s (NCCL's two rings), then of 3 · 64 KiB at 450 GB/s.
    assert "takes 1.75 µs instead of 7.86 µs" in finding.evidence
    assert finding.remedy == "Write order = [0, 4, 1, 5, 2, 6, 3, 7] in the mesh file."


def test_the_order_of_the_remedy_is_what_order_finds() -> None:
    found: Orders = orders(GOLDEN / "gather_in_loop.gpu.hlo", load_machine("h100:2x4"), MESH)
    assert found.results[0].device_ids == X_WITHIN_HOSTS


@pytest.mark.parametrize(
    ("name", "machine", "device_ids"),
    [
        pytest.param("gather_in_loop.gpu", "h100:2x4", X_WITHIN_HOSTS, id="in that order"),
        pytest.param("gather_then_convert.gpu", "h100:2x4", None, id="groups of all devices"),
        pytest.param("gather_in_loop.gpu", "h100:1x8", None, id="one host"),
        pytest.param("gather_in_loop.gpu", "h100:4x2", None, id="no host holds the group"),
        pytest.param("gather_in_loop.gpu", None, None, id="no machine"),
        pytest.param("gather_in_loop.tpu", "v5p:2x2x2", None, id="a torus has one kind of link"),
    ],
)
def test_nothing_found(name: str, machine: str | None, device_ids: tuple[int, ...] | None) -> None:
    assert placed(name, machine, device_ids) == ()


def test_only_what_the_other_order_moves_is_named() -> None:
    """Over x 4,096 B, of whose 6,144 B on the wire 1/3 crosses, and 8,192 B over x and y: all
    eight devices are across hosts in any order."""
    machine = load_machine("h100:2x4")
    parts = tuple(attribute(program(MESH, (["x"], 4096), (["x", "y"], 8192)), MESH, None, machine))
    (finding,) = audit_parts(parts, machine)
    assert (finding.axes, finding.wire_bytes) == (("x",), (2048, 2048))


def test_collectives_of_one_axis_are_one_finding() -> None:
    machine = load_machine("h100:2x4")
    parts = tuple(attribute(program(MESH, (["x"], 4096), (["x"], 8192)), MESH, None, machine))
    (finding,) = audit_parts(parts, machine)
    assert (finding.instruction, finding.wire_bytes) == ("r1", (2048 + 4096, 2048 + 4096))
    assert "6.14 kB per step of r1 and 1 more go over infiniband" in finding.evidence


def test_no_order_is_priced_where_no_group_fits_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule, "best_orders", None)
    assert placed("gather_then_convert.gpu") == ()
    with pytest.raises(TypeError):
        placed("gather_in_loop.gpu")


def test_a_long_order_is_not_spelled_out() -> None:
    mesh, machine = {"x": 8, "y": 16}, load_machine("h100:16x8")
    parts = tuple(attribute(program(mesh, (["x"], 1 << 26)), mesh, None, machine))
    (finding,) = audit_parts(parts, machine)
    assert finding.remedy.startswith(
        "Write order = [its device_ids] in the mesh file; --order --json lists them"
    )


def test_without_axes_no_order_is_tried() -> None:
    machine = load_machine("h100:2x4")
    parts = tuple(attribute(GOLDEN / "gather_in_loop.gpu.hlo", None, None, machine))
    assert [one.rule for one in audit_parts(parts, machine)] == ["gathered-every-trip"]
