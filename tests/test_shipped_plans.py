"""Every shipped plan, compiled for its own target: the analysis and the second counter agree to the byte.

The counter reads the serialized module and shares no code with the package. A small plan per target always
runs, a few more in the `matrix` subset, the rest with `full`.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

import pytest
from compiled_plans import MESHES, compiled_case, compiled_plan
from second_counter import count

from shardlab.analysis import analyze
from shardlab.cost.memory import memory_report
from shardlab.program import Program
from shardlab.spec.case import make_case
from shardlab.spec.models import MODELS
from shardlab.spec.plan import load_plan

ALWAYS = {"cpu8-tensor"}
SUBSET = {"h100x8-fsdp8", "decode-cpu8-tensor2-cache4", "cpu8-fsdp"}
NAMES = sorted(path.stem for path in MESHES.glob("*.toml") if path.stem != "budgets")
ByteRange = tuple[Fraction, Fraction | None]


def target_of(name: str) -> list[pytest.MarkDecorator]:
    """What the plan's compiler needs: the extra that brings it."""
    name = name.removeprefix("decode-").removeprefix("prefill-")
    if name.startswith("cpu"):
        return []
    return [pytest.mark.tpu if name.startswith(("v4", "v5", "v6", "tpu")) else pytest.mark.gpu]


def extent_of(name: str) -> list[pytest.MarkDecorator]:
    """How often the plan is tried."""
    return [] if name in ALWAYS else [pytest.mark.matrix if name in SUBSET else pytest.mark.full]


def moving(figures: Mapping[str, Mapping[str, ByteRange]]) -> dict[str, ByteRange]:
    """The wire bytes of a breakdown, without what moves nothing."""
    return {key: value["wire_bytes"] for key, value in figures.items() if value["wire_bytes"] != (0, 0)}


def test_the_named_plans_are_shipped() -> None:
    assert set(NAMES) >= ALWAYS | SUBSET


@pytest.mark.parametrize("name", [pytest.param(n, marks=target_of(n) + extent_of(n)) for n in NAMES])
def test_two_counters_agree(name: str) -> None:
    case, program, proto = compiled_plan(name)
    assert program.refusal is None, f"{name} does not fit its own machine"
    if name.endswith(tuple(MODELS)):  # a layout for one model
        assert memory_report(program.memory, program.refusal, case.load_machine()).fits in ("yes", "tight")
    if case.plan.method.pipeline == "none":
        check(program, proto)
    else:
        check_within(program, proto)


@pytest.mark.tpu
def test_two_counters_agree_on_a_small_tpu() -> None:
    """The shipped TPU plans compile for minutes; this is a small plan on eight chips."""
    plan = load_plan(MESHES / "cpu8-data2-fsdp2-tensor2.toml")
    case = make_case(plan, model="tiny", machine="v5e:2x4", batch=8, seq=256)
    check(*compiled_case(case))


def check_within(program: Program, proto: bytes) -> None:
    """The counter reads no tables: any branch of a pipeline may run at any tick, so its range is wider."""
    assert program.mesh is not None
    counted = count(proto, program.num_devices, program.mesh)
    for axes, (low, high) in moving(analyze(program).totals.by_axes).items():
        least, most = counted.by_axes[axes]
        assert high is not None
        assert most is not None
        assert least <= low <= high <= most


def check(program: Program, proto: bytes) -> None:
    """Equal by axes, by kind, and in all."""
    assert program.mesh is not None
    counted = count(proto, program.num_devices, program.mesh)
    totals = analyze(program).totals
    assert counted.total[0] > 0
    assert moving(totals.by_axes) == counted.by_axes
    assert moving(totals.by_kind) == counted.by_kind
    assert totals.wire_bytes == counted.total
