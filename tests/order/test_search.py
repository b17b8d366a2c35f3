"""Device orders priced: by hand on two hosts and on a torus, and against `analyze` of each order found."""

from __future__ import annotations

import json
import time
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import pytest
from bare_links import bare
from hypothesis import given, settings
from hypothesis import strategies as st
from order_programs import program

from shardlab.analysis import analyze
from shardlab.cost.network import communication
from shardlab.errors import UserError
from shardlab.hardware.catalog import load_machine
from shardlab.order import orders, orders_member

GOLDEN = Path(__file__).parents[1] / "golden" / "hlo"
TWO_HOSTS = {"data": 2, "tensor": 4}
K = 1 << 14
# All-reduce of 4,096 K over tensor: 2 · 3/4 · 4096 = 6,144 K on the wire; of 64 K over data: 2 · 1/2 · 64.
PROGRAM = program(TWO_HOSTS, (["tensor"], 4096 * K), (["data"], 64 * K))
INSIDE = {"nvlink": (6144 * K, 6144 * K), "infiniband": (64 * K, 64 * K)}
# Tensor over 2 GPUs of each of 2 hosts: of 6,144 K a third goes between the hosts, (r_1 - 1) / (n - 1).
ACROSS = {"nvlink": ((4096 + 64) * K, (4096 + 64) * K), "infiniband": (2048 * K, 2048 * K)}
NVLINK, INFINIBAND = 450e9, 50e9  # bytes per second: shardlab/hardware/data


def test_tensor_inside_a_host_is_best_and_is_row_major() -> None:
    found = orders(PROGRAM, bare("h100:2x4"), TWO_HOSTS)
    best, second = found.results
    assert (best.name, best.own, best.tiers) == ("as compiled: row-major", True, INSIDE)
    assert best.device_ids == (0, 1, 2, 3, 4, 5, 6, 7)
    assert best.communication_s == pytest.approx(6144 * K / NVLINK + 64 * K / INFINIBAND, rel=1e-12, abs=0)
    assert (second.own, second.tiers) == (False, ACROSS)
    # NCCL's two rings send 6 pieces of 1,024 K through a NIC every second time: 3 each.
    assert second.communication_s == pytest.approx(3072 * K / INFINIBAND + 64 * K / NVLINK, rel=1e-12, abs=0)
    assert (found.tried, found.complete, found.by) == (3, True, "time")


def test_an_order_that_puts_tensor_across_hosts_is_told_what_is_better() -> None:
    across = (0, 2, 4, 6, 1, 3, 5, 7)  # position (d, t) -> device 2 t + d
    found = orders(PROGRAM, load_machine("h100:2x4"), TWO_HOSTS, across)
    best, own = found.results
    assert (best.name, best.tiers, best.how) == (
        "row-major", INSIDE, 'order = "row-major" in the mesh file',
    )  # fmt: skip
    assert (own.own, own.device_ids, own.tiers) == (True, across, ACROSS)
    assert own.name == "as compiled: nested tensor > data"
    assert own == found.own


def test_an_order_of_no_pattern_keeps_its_name() -> None:
    """Tensor groups {0, 5, 1, 4} and {2, 7, 3, 6} are 2 + 2, data pairs {0, 2}, {5, 7}, … inside a host."""
    own = (0, 5, 1, 4, 2, 7, 3, 6)
    found = orders(PROGRAM, load_machine("h100:2x4"), TWO_HOSTS, own, own_name="make_mesh")
    assert (found.own.name, found.own.tiers) == ("make_mesh", ACROSS)
    assert found.results[0].tiers == INSIDE
    assert found.tried == 4


def test_blocks_of_a_torus_without_rings_beat_lines() -> None:
    """v5e 4 x 4 has no wraparound: four chips along x are a line, one link. As 2 x 2 they have a link in each
    dimension, or half of one where the other axis' chips lie between them. Tensor and data of four each, both
    with 2 · 3/4 · 4096 = 6,144 B: lines take 1/1 + 1/1; near and apart in both dimensions 1/2 + 1/1; near in
    one and apart in the other 1/1.5 + 1/1.5."""
    mesh = {"data": 4, "tensor": 4}
    machine = bare("v5e:4x4")
    link_s = 6144 / (machine.domains[0].bytes_per_s or 0.0)
    found = orders(program(mesh, (["tensor"], 4096), (["data"], 4096)), machine, mesh)
    seconds = [result.communication_s for result in found.results]
    assert seconds == pytest.approx([4 / 3 * link_s, 3 / 2 * link_s, 2 * link_s], rel=1e-12, abs=0)
    assert [result.own for result in found.results] == [False, False, True]
    assert all(result.tiers == {"ici": (12288, 12288)} for result in found.results)
    near = {frozenset(corner + step for step in (0, 1, 4, 5)) for corner in (0, 2, 8, 10)}
    apart = {frozenset(corner + step for step in (0, 2, 8, 10)) for corner in (0, 1, 4, 5)}
    second = found.results[1].device_ids
    assert {frozenset(second[4 * d : 4 * d + 4]) for d in range(4)} in (near, apart)


def test_512_chips_take_less_than_five_seconds() -> None:
    """Tensor of 8 on 8 x 8 x 8: a ring along x has two links, a 2 x 2 x 2 block three lines of one each."""
    mesh = {"data": 8, "fsdp": 8, "tensor": 8}
    text = program(mesh, *((axes, 4096) for r in (1, 2, 3) for axes in combinations(mesh, r)))
    machine = bare("v5p:8x8x8")
    started = time.process_time()
    found = orders(text, machine, mesh)
    assert time.process_time() - started < 5
    assert found.tried > 50
    alone = orders(program(mesh, (["tensor"], 4096)), machine, mesh)
    rate = machine.domains[0].bytes_per_s or 0.0
    sent = 2 * Fraction(7, 8) * 4096
    assert alone.own.communication_s == pytest.approx(float(sent) / (2 * rate), rel=1e-12, abs=0)
    assert alone.results[0].communication_s == pytest.approx(float(sent) / (3 * rate), rel=1e-12, abs=0)


def test_branches_stay_ranges() -> None:
    """Two conditionals, each with an all-reduce of 4,096 B over model (6,144 B) or over data (4,096 B)."""
    mesh = {"data": 2, "model": 4}
    text = (GOLDEN / "d17_conditional.hlo").read_text()
    found = orders(text, load_machine("h100:2x4"), mesh)
    assert found.own.tiers == {"nvlink": (0, 2 * 6144), "infiniband": (0, 2 * 4096)}


def test_an_unknown_trip_count_leaves_bytes_to_rank_by() -> None:
    text = (GOLDEN / "d13_dynamic_trip.hlo").read_text()
    analysis = analyze(text, axes={"data": 2, "model": 4}, machine=load_machine("h100:2x4"))
    found = orders(text, load_machine("h100:2x4"), {"data": 2, "model": 4})
    assert found.by == "bytes"
    assert found.own.communication_s is None
    assert found.own.tiers == analysis.totals.traffic
    assert any(high is None for _, high in found.own.tiers.values())
    assert "communication_s" not in json.dumps(orders_member(found))


def test_slices_are_left_as_they_are() -> None:
    mesh = {"dcn": 2, "data": 4, "model": 4}
    text = (GOLDEN / "b23_multi_slice_in_slice_groups.hlo").read_text()
    machine = load_machine("v5e:4x4*2")
    found = orders(text, machine, mesh)
    (only,) = found.results
    assert only.own
    assert only.tiers == analyze(text, axes=mesh, machine=machine).totals.traffic
    assert "slices" in found.notes[0]


def test_emulated_devices_are_all_alike() -> None:
    found = orders(PROGRAM, load_machine("cpu:8"), TWO_HOSTS)
    assert [result.own for result in found.results] == [True]
    assert found.tried == 2
    assert "every order moves the same" in found.notes[0]


@pytest.mark.parametrize(
    ("sources", "axes", "wanted"),
    [([PROGRAM, PROGRAM], TWO_HOSTS, "2 modules"), ([PROGRAM], None, "mesh is not known")],
    ids=["several-modules", "no-axes"],
)
def test_what_cannot_be_ordered_is_refused(
    sources: list[str], axes: dict[str, int] | None, wanted: str
) -> None:
    with pytest.raises(UserError, match=wanted):
        orders(sources, load_machine("h100:2x4"), axes)


def test_the_document_has_the_lists_that_a_mesh_file_takes() -> None:
    member = orders_member(orders(PROGRAM, load_machine("h100:2x4"), TWO_HOSTS))["orders"]
    assert isinstance(member, dict)
    assert (member["tried"], member["complete"], member["ranked_by"]) == (3, True, "time")
    first = member["results"][0]
    assert first["device_ids"] == list(range(8))
    assert first["traffic"] == {"nvlink": [6144 * K] * 2, "infiniband": [64 * K] * 2}
    assert all(sorted(result["device_ids"]) == list(range(8)) for result in member["results"])
    assert orders_member(None) == {}


MESHES = [
    ("h100:2x4", {"data": 2, "tensor": 4}),
    ("h100:4x2", {"a": 2, "b": 2, "c": 2}),
    ("h100:3x4", {"a": 6, "b": 2}),
    ("v5e:4x2", {"a": 2, "b": 4}),
    ("v5p:2x2x4", {"a": 4, "b": 2, "c": 2}),
    ("tpu7x:2x2x1", {"a": 4, "b": 2}),
]


@st.composite
def programs(draw: st.DrawFn) -> tuple[str, dict[str, int], str, tuple[int, ...] | None]:
    """A machine, a mesh, collectives over some of its sets of axes, and an order of its devices."""
    machine, mesh = draw(st.sampled_from(MESHES))
    sets = [list(axes) for r in range(1, len(mesh) + 1) for axes in combinations(mesh, r)]
    chosen = draw(st.lists(st.tuples(st.sampled_from(sets), st.integers(1, 4000)), min_size=1, max_size=5))
    text = program(mesh, *((axes, 4 * words) for axes, words in chosen))
    count = load_machine(machine).num_devices
    order = draw(st.none() | st.permutations(range(count)).map(tuple))
    return machine, mesh, text, order


@settings(max_examples=40, deadline=None)
@given(programs())
def test_every_order_found_is_what_analyze_says_of_it(
    case: tuple[str, dict[str, int], str, tuple[int, ...] | None],
) -> None:
    """Never worse than the program's own; each figure is that of the program analysed in that order; axes,
    payload and wire bytes are the program's in every one."""
    name, mesh, text, order = case
    machine = load_machine(name)
    found = orders(text, machine, mesh, order)
    plain = analyze(text, axes=mesh, device_ids=order, machine=machine)
    assert found.own.tiers == plain.totals.traffic
    best, own = found.results[0].communication_s, found.own.communication_s
    assert best is not None and own is not None
    assert best <= own * (1 + 1e-8)  # orders are told apart by nine digits
    for result in found.results:
        assert sorted(result.device_ids) == list(range(machine.num_devices))
        again = analyze(text, axes=mesh, device_ids=result.device_ids, machine=machine)
        assert again.totals.traffic == result.tiers
        seconds = communication(again, machine).communication_s
        assert result.communication_s == pytest.approx(seconds, rel=1e-12, abs=0)
        assert again.totals.wire_bytes == plain.totals.wire_bytes
        assert [row.axes for row in again.collectives] == [row.axes for row in plain.collectives]
