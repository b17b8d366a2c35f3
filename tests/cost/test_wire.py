"""The formulas of DESIGN section 3, against what each algorithm sends step by step."""

from __future__ import annotations

from fractions import Fraction

import pytest

from shardlab.cost.wire import KINDS, POINT_TO_POINT, wire_of

GROUPS_OF_4 = ((0, 1, 2, 3), (4, 5, 6, 7))


@pytest.mark.parametrize(
    ("kind", "operand", "result", "payload", "wire", "fabric"),
    [
        # a ring of 4: 3 steps of a quarter out and 3 back
        ("all-reduce", 4_096, 4_096, 4_096, 2 * 3 * 1_024, 8 * 6_144),
        # 3 steps, each passes one shard on
        ("all-gather", 1_024, 4_096, 4_096, 3 * 1_024, 8 * 3_072),
        # packed s4[15]: 8 bytes a shard, 30 together
        ("all-gather", 8, 30, 30, 24, 8 * 24),
        ("reduce-scatter", 4_096, 1_024, 4_096, 3 * 1_024, 8 * 3_072),
        # one of four pieces stays
        ("all-to-all", 512, 512, 512, 384, 8 * 384),
        ("ragged-all-to-all", 512, 2_048, 512, 512, 8 * 512),
        # forwarded by all but the last of each group
        ("collective-broadcast", 512, 512, 512, 512, 2 * 3 * 512),
    ],
)
def test_group_collectives(
    kind: str, operand: int, result: int, payload: int, wire: int, fabric: int
) -> None:
    found = wire_of(kind=kind, operand_bytes=operand, result_bytes=result, groups=GROUPS_OF_4)
    assert (found.payload_bytes, found.wire_bytes, found.fabric_bytes) == (payload, wire, fabric)


@pytest.mark.parametrize("kind", sorted(POINT_TO_POINT))
def test_an_open_chain_counts_its_senders(kind: str) -> None:
    found = wire_of(kind=kind, operand_bytes=100, result_bytes=0, pairs=((0, 1), (1, 2), (3, 3)))
    assert (found.payload_bytes, found.wire_bytes, found.fabric_bytes) == (100, 100, 200)


@pytest.mark.parametrize("kind", sorted(POINT_TO_POINT))
def test_self_pairs_move_nothing(kind: str) -> None:
    found = wire_of(kind=kind, operand_bytes=100, result_bytes=0, pairs=((0, 0), (1, 1)))
    assert (found.payload_bytes, found.wire_bytes, found.fabric_bytes) == (100, 0, 0)


@pytest.mark.parametrize("kind", sorted(KINDS - POINT_TO_POINT))
def test_groups_of_one_move_nothing(kind: str) -> None:
    found = wire_of(kind=kind, operand_bytes=64, result_bytes=64, groups=((0,), (1,)))
    assert (found.payload_bytes, found.wire_bytes, found.fabric_bytes) == (64, 0, 0)


def test_thirds_stay_exact() -> None:
    found = wire_of(kind="all-reduce", operand_bytes=4_096, result_bytes=4_096, groups=((0, 1, 2),))
    assert found.wire_bytes == Fraction(16_384, 3)
    assert found.fabric_bytes == 16_384


def test_uneven_groups_give_the_busiest_device_and_the_true_sum() -> None:
    found = wire_of(kind="reduce-scatter", operand_bytes=120, result_bytes=0, groups=((0, 1), (2, 3, 4)))
    assert (found.wire_bytes, found.fabric_bytes) == (80, 2 * 60 + 3 * 80)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="all-scatter"):
        wire_of(kind="all-scatter", operand_bytes=1, result_bytes=1)
