"""Thousands of devices, each listed in every collective (V1): time in proportion to the text, exact figures.

Time is compared with itself within one run: eight times the devices, or the collectives, must not take
more than three times eight as long, where the square would be sixty-four times.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest

import shardlab

TIMES = 8
DEVICES = 9_000
ADD = "%add {\n  %a = f32[] parameter(0)\n  %b = f32[] parameter(1)\n  ROOT %s = f32[] add(%a, %b)\n}\n\n"
REDUCE = "all-reduce(%p), channel_id=1, replica_groups={}, use_global_device_ids=true, to_apply=%add"


def braced(groups: list[list[int]]) -> str:
    return "{" + ",".join("{" + ",".join(map(str, group)) + "}" for group in groups) + "}"


def over_model(devices: int, number: int) -> str:
    """Consecutive ids, 8 by 8; members and groups in another order in each collective."""
    chosen = random.Random(number)
    groups = [chosen.sample(range(i, i + 8), 8) for i in range(0, devices, 8)]
    chosen.shuffle(groups)
    return REDUCE.format(braced(groups))


def over_data(devices: int, number: int) -> str:
    """Every 8th id: groups of 1,125 of 9,000."""
    groups = [list(range(i, devices, 8)) for i in range(8)]
    random.Random(number).shuffle(groups)
    return REDUCE.format(braced(groups))


def around(devices: int, number: int) -> str:
    """A ring over all: as many pairs as devices."""
    pairs = [[i, (i + 1) % devices] for i in range(devices)]
    random.Random(number).shuffle(pairs)
    return f"collective-permute(%p), channel_id=1, source_target_pairs={braced(pairs)}"


def module(devices: int, count: int, collective: Callable[[int, int], str]) -> str:
    """`count` collectives, no two written alike."""
    lines = "".join(f"  %c{i} = f32[64]{{0}} {collective(devices, i)}\n" for i in range(count))
    return (
        f"HloModule m, num_partitions={devices}\n\n{ADD}ENTRY %main {{\n  %p = f32[64]{{0}} parameter(0)\n"
        f"{lines}  ROOT %r = f32[64]{{0}} copy(%p)\n}}\n"
    )


def seconds(devices: int, count: int, collective: Callable[[int, int], str]) -> float:
    text = module(devices, count, collective)
    start = time.process_time()
    found = shardlab.analyze(text, {"data": devices // 8, "model": 8})
    taken = time.process_time() - start
    assert len(found.collectives) == count
    return taken


COLLECTIVES = [over_model, over_data, around]


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_time_grows_with_the_devices_and_not_faster(collective: Callable[[int, int], str]) -> None:
    few, many = DEVICES // TIMES // 8 * 8, DEVICES
    small = min(seconds(few, 12, collective) for _ in range(5))
    assert min(seconds(many, 12, collective) for _ in range(2)) < 3 * TIMES * small


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_time_grows_with_the_collectives_and_not_faster(collective: Callable[[int, int], str]) -> None:
    small = min(seconds(DEVICES, 3, collective) for _ in range(5))
    assert min(seconds(DEVICES, 3 * TIMES, collective) for _ in range(2)) < 3 * TIMES * small


def test_figures_of_nine_thousand_devices() -> None:
    """256 bytes: 2 · 7/8 of them over model, 2 · 1124/1125 over data."""
    mesh = {"data": DEVICES // 8, "model": 8}
    (model,) = shardlab.analyze(module(DEVICES, 1, over_model), mesh).collectives
    (data,) = shardlab.analyze(module(DEVICES, 1, over_data), mesh).collectives
    assert (model.axes, model.group_size, model.num_groups, model.wire_bytes) == (("model",), 8, 1_125, 448)
    assert (data.axes, data.group_size, data.num_groups) == (("data",), 1_125, 8)
    assert data.wire_bytes * 1_125 == 2 * 1_124 * 256
    assert model.fabric_bytes == 448 * DEVICES
