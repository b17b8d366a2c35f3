"""Compile-only devices as the compilers number them, against the machine's numbering."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shardlab.compile.environment import child_environment
from shardlab.hardware.catalog import load_machine
from shardlab.hardware.machine import Machine
from shardlab.hardware.placement import core_on_chip, slice_index, torus_coords

ROOT = Path(__file__).parents[2]
OPEN = """
import json, sys
from shardlab.compile.target import open_target
from shardlab.hardware.catalog import load_machine
answer = {}
for spec in sys.argv[1:]:
    target = open_target(load_machine(spec))
    answer[spec] = [
        [
            d.id,
            list(getattr(d, "coords", ())),
            getattr(d, "core_on_chip", 0),
            getattr(d, "slice_index", None) or 0,
        ]
        for d in target.devices
    ]
    assert target.coords is None or [list(c) for c in target.coords] == [row[1] for row in answer[spec]]
print(json.dumps(answer))
"""


def opened(*specs: str) -> dict[str, list[tuple[int, list[int], int, int]]]:
    """(id, coords, core, slice) of each device, in the order that shardlab gives them."""
    machine = load_machine(specs[0])
    environment = child_environment(machine, (), os.environ) | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", OPEN, *specs]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    answer: dict[str, list[tuple[int, list[int], int, int]]] = json.loads(done.stdout)
    return answer


def expected_tpu(machine: Machine) -> list[tuple[list[int], int, int]]:
    """(coords, core, slice) in machine order: slices, then z, y, x (fastest), then the cores of a chip."""
    x, y, z = (*machine.torus, 1)[:3]
    cores = machine.chip.xla_devices
    grid = itertools.product(range(machine.slices), range(z), range(y), range(x), range(cores))
    return [([x_, y_, z_], core, s) for s, z_, y_, x_, core in grid]


TPUS = ("v5e:4x4", "v5e:2x2*2", "v5p:4x4x8", "v4:2x2x2", "v6e:2x4", "tpu7x:2x2x1")


@pytest.mark.tpu
def test_libtpu_and_the_machine_agree_on_device_numbers() -> None:
    answer = opened(*TPUS)
    for spec in TPUS:
        machine = load_machine(spec)
        found = [(coords, core, slice_) for _, coords, core, slice_ in answer[spec]]
        assert found == expected_tpu(machine), spec
        for device, (coords, core, slice_) in enumerate(found):
            assert tuple(coords[: len(machine.torus)]) == torus_coords(machine, device)[: len(machine.torus)]
            assert (core, slice_) == (core_on_chip(machine, device), slice_index(machine, device))


@pytest.mark.gpu
def test_gpus_count_host_by_host() -> None:
    answer = opened("h100:4x8", "rtx4090:1x2", "a100:1x8", "b200:1x8")
    assert [len(rows) for rows in answer.values()] == [32, 2, 8, 8]
    for rows in answer.values():
        assert [row[0] for row in rows] == list(range(len(rows)))


def test_emulated_devices() -> None:
    assert [row[0] for row in opened("cpu:6")["cpu:6"]] == list(range(6))
