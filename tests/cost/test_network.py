from dataclasses import dataclass, field
from fractions import Fraction

import pytest

from shardlab.cost.network import TorusDim, communication, permute_load, torus_span
from shardlab.hardware.machine import Chip, Domain, Machine

CHIP = Chip(name="chip", family="tpu", memory_bytes=None)
GPUS = Machine(
    spec="gpus",
    chip=CHIP,
    num_devices=16,
    domains=(
        Domain(tier="nvlink", size=8, bytes_per_s=100.0),
        Domain(tier="infiniband", size=16, bytes_per_s=10.0),
    ),
)
TORUS = Machine(
    spec="torus",
    chip=CHIP,
    num_devices=32,
    domains=(Domain(tier="ici", size=32, bytes_per_s=10.0),),
    torus=(8, 4),
    wraps=(True, False),
)


@dataclass
class Row:
    executions: tuple
    tier_s: dict | None = None
    time_s: float | None = None
    traffic: dict | None = None
    wire_bytes: Fraction = Fraction(1)


@dataclass
class Rows:
    collectives: list = field(default_factory=list)


def test_tiers_of_one_collective_work_at_once_and_collectives_do_not():
    rows = Rows([Row((3, 3), {"nvlink": 2.0, "infiniband": 5.0}), Row((1, 4), {"nvlink": 7.0})])
    result = communication(rows, GPUS)
    assert result.communication_s == 3 * 5.0 + 4 * 7.0
    assert result.tier_s == {"nvlink": 3 * 2.0 + 4 * 7.0, "infiniband": 15.0}
    assert result.dominant == "nvlink"


def test_the_time_of_a_row_counts_its_latency() -> None:
    rows = Rows([Row((3, 3), {"nvlink": 2.0, "infiniband": 5.0}, time_s=6.5)])
    result = communication(rows, GPUS)
    assert (result.communication_s, result.tier_s) == (3 * 6.5, {"nvlink": 6.0, "infiniband": 15.0})


def test_no_communication_takes_no_time():
    nothing = Rows([Row((5, 5), None, wire_bytes=Fraction(0)), Row((0, 0), None)])
    result = communication(nothing, GPUS)
    assert (result.communication_s, result.tier_s, result.dominant) == (0.0, {}, "")


@pytest.mark.parametrize(
    "unknown",
    [
        pytest.param(Row((0, None), {"nvlink": 1.0}), id="unbounded-loop"),
        pytest.param(Row((1, 1)), id="no-machine-when-analysed"),
        pytest.param(Row((1, 1), traffic={"wan": Fraction(1)}), id="tier-the-machine-lacks"),
        pytest.param(Row((1, 1), traffic={}), id="traffic-nowhere"),
    ],
)
def test_one_unknown_makes_the_total_unknown_but_not_the_tiers(unknown):
    result = communication(Rows([Row((2, 2), {"nvlink": 3.0}), unknown]), GPUS)
    assert result.communication_s is None
    assert result.tier_s == {"nvlink": 6.0}


def test_rows_without_times_are_priced_from_their_traffic():
    row = Row((2, 2), traffic={"nvlink": Fraction(50), "infiniband": Fraction(20)})
    assert communication(Rows([row]), GPUS).communication_s == 2 * 20 / 10.0
    on_torus = Row((1, 1), traffic={"ici": Fraction(10)})
    assert communication(Rows([on_torus]), TORUS).communication_s is None  # its rate needs coordinates


@pytest.mark.parametrize(
    ("coords", "dims", "block", "per_chip"),
    [
        pytest.param([(x, 0) for x in range(8)], (TorusDim(8, 1, True),), True, 1, id="ring"),
        pytest.param(
            [(0, y) for y in range(4)], (TorusDim(4, 1, False),), True, 1, id="whole-dimension-no-wrap"
        ),
        pytest.param([(6, 1), (7, 1), (0, 1)], (TorusDim(3, 1, False),), True, 1, id="over-the-edge"),
        pytest.param([(0, 0), (4, 0)], (TorusDim(2, 4, True),), True, 1, id="opposite-on-a-ring"),
        pytest.param([(0, 0), (0, 2)], (TorusDim(2, 2, False),), True, 1, id="every-other-on-a-line"),
        pytest.param(
            [(0, 0), (1, 0), (3, 0)], (TorusDim(3, 2, False),), True, 1, id="irregular-widest-hop-counts"
        ),
        pytest.param(
            [(0, 0), (1, 1)], (TorusDim(2, 1, False), TorusDim(2, 1, False)), False, 1, id="diagonal"
        ),
        pytest.param(
            [(0, 0), (0, 0), (1, 0), (1, 0)], (TorusDim(2, 1, False),), True, 2, id="two-devices-a-chip"
        ),
    ],
)
def test_torus_span(coords, dims, block, per_chip):
    span = torus_span(coords, TORUS)
    assert (span.dims, span.block, span.per_chip) == (dims, block, per_chip)


@pytest.mark.parametrize(
    ("pairs", "load"),
    [
        pytest.param([], 0, id="nothing"),
        pytest.param([((0, 0), (0, 0))], 0, id="same-chip"),
        pytest.param([((7, 0), (0, 0))], 1, id="over-the-edge"),
        pytest.param([((0, 0), (4, 0))], Fraction(1, 2), id="half-way-splits"),
        pytest.param([((0, 0), (0, 3)), ((0, 1), (0, 2))], 2, id="line-shares-its-middle"),
        pytest.param([((0, 0), (1, 0)), ((1, 0), (0, 0))], 1, id="directions-do-not-share"),
        pytest.param([((0, 0), (2, 0)), ((7, 0), (1, 0))], 2, id="overlapping-routes"),
        pytest.param([((0, 0), (6, 0)), ((1, 0), (2, 0))], 1, id="the-shorter-way-is-backwards"),
    ],
)
def test_permute_load(pairs, load):
    assert permute_load(pairs, TORUS) == load
