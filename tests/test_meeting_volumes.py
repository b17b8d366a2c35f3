"""What context parallelism and experts send inside a pipeline, against closed forms: on CPU, GPU and TPU."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from fractions import Fraction
from functools import cache
from math import ceil
from typing import Any

import pytest
from compiled_plans import scheduled_case
from emulated import asked

from shardlab.analysis import Analysis, CollectiveRow, analyze
from shardlab.spec.case import make_case
from shardlab.spec.models import find_model
from shardlab.spec.params import parameter_table

pytestmark = pytest.mark.full

F32_BYTES = 4
MODEL = replace(find_model("tiny"), name="tiny-grouped", layers=4, kv_heads=4)
MIXTURE = replace(MODEL, name="tiny-mixture", num_experts=8, experts_per_token=2, balance_coefficient=0.02)
BATCH, SEQ, MICROBATCHES, STAGES, WAYS = 16, 128, 4, 2, 4
SMALL = 4_096  # bytes per step: the loss, the norm of the gradients, means of experts' loads
# Of the 2 (m + p - 1) ticks of 1F1B (Narayanan et al., arXiv:2104.04473, section 2.2.1) a stage in the
# middle sends at each. Of two stages none is: one sends activations, the other cotangents, at every other.
SENDS = MICROBATCHES + STAGES - 1
LAYERS = MODEL.layers // STAGES * MICROBATCHES  # how often a stage runs a layer, forward, per step
FORWARDS = 2  # a layer's backward computes its forward again
TOKENS = BATCH * SEQ // MICROBATCHES // WAYS  # of one device in one microbatch


ON = pytest.mark.parametrize(
    "on",
    [
        "cpu:8",
        pytest.param("h100:1x8", marks=pytest.mark.gpu),
        pytest.param("v5e:2x4", marks=pytest.mark.tpu),
    ],
)


@cache
def compiled(on: str, axis: str, **method: Any) -> Analysis:
    plan = asked({"stage": STAGES, axis: WAYS}, pipeline="1f1b", microbatches=MICROBATCHES, **method)
    case = make_case(plan, MIXTURE if axis == "expert" else MODEL, on, BATCH, SEQ)
    return analyze(scheduled_case(case))


def element_bytes(on: str) -> int:
    """bf16, which XLA:CPU widens to f32."""
    return 4 if on.startswith("cpu") else 2


def sent(analysis: Analysis) -> dict[tuple[str, str], Fraction]:
    """(axes, kind) -> exact bytes of the busiest device; what is small is left out.

    Each stage runs branches of its own, so that devices are summed apart.
    """
    found: dict[tuple[str, str], dict[int, Fraction]] = defaultdict(lambda: defaultdict(Fraction))
    for row in analysis.collectives:
        key = "+".join(row.axes or ("unknown",)), row.kind
        for device, times in runs(row).items():
            found[key][device] += row.wire_bytes * times
    busiest = {key: max(devices.values()) for key, devices in found.items()}
    return {key: value for key, value in busiest.items() if value > SMALL}


def runs(row: CollectiveRow) -> dict[int, int]:
    """How often each device runs it."""
    if row.by_device is None:
        return dict.fromkeys(range(STAGES * WAYS), exactly(row.executions))
    found = {}
    for part in row.by_device:
        for written in part.devices.split(","):
            first, _, last = written.partition("-")
            found |= dict.fromkeys(range(int(first), int(last or first) + 1), exactly(part.executions))
    return found


def exactly(executions: tuple[int, int | None]) -> int:
    low, high = executions
    assert low == high
    return low


def near(actual: Fraction, expected: Fraction) -> bool:
    return 0 <= actual - expected <= SMALL


def passed_on(on: str, more: int = 0) -> Fraction:
    """Over the stages: an activation or a cotangent each time, and so many bytes more."""
    return SENDS * (Fraction(TOKENS * MODEL.embed * element_bytes(on)) + more)


def gradients(*, in_layers: bool, ways: int) -> Fraction:
    """All-reduced once per step in f32: of a stage's layers, or of what is in no layer."""
    found = sum(p.size for p in parameter_table(MODEL) if p.path.startswith("layers/") == in_layers)
    return Fraction(2 * (ways - 1), ways) * F32_BYTES * (found // STAGES if in_layers else found)


def check_rest(found: dict[tuple[str, str], Fraction], on: str) -> None:
    """Activations between stages and gradients once per step, as beside data parallelism; nothing else."""
    assert near(found.pop(("stage", "collective-permute")), passed_on(on))
    assert near(found.pop(("context", "all-reduce")), gradients(in_layers=True, ways=WAYS))
    assert near(found.pop(("stage+context", "all-reduce")), gradients(in_layers=False, ways=WAYS * STAGES))
    assert found == {}


@ON
def test_gathered_keys_in_stages(on: str) -> None:
    """Every microbatch gathers the keys and values of each layer of its stage, n - 1 shards, forward and
    again backward, and scatters their gradients once (Llama 3, arXiv:2407.21783, section 3.3.2)."""
    found = sent(compiled(on, "context", context="all-gather"))
    keys_values = 2 * TOKENS * MODEL.kv_heads * MODEL.head_dim * element_bytes(on)
    assert found.pop(("context", "all-gather")) == LAYERS * FORWARDS * (WAYS - 1) * keys_values
    assert found.pop(("context", "reduce-scatter")) == LAYERS * (WAYS - 1) * keys_values
    check_rest(found, on)


@ON
def test_ulysses_in_stages(on: str) -> None:
    """Four all-to-alls per layer and pass, of queries, keys, values and output (arXiv:2309.14509, 3.2)."""
    found = sent(compiled(on, "context", context="ulysses"))
    heads = 2 * MODEL.heads + 2 * MODEL.kv_heads
    part = TOKENS * heads * MODEL.head_dim * element_bytes(on)
    expected = Fraction(WAYS - 1, WAYS) * part * (FORWARDS + 1) * LAYERS
    assert found.pop(("context", "all-to-all")) == expected
    check_rest(found, on)


@ON
def test_experts_in_stages(on: str) -> None:
    """Two all-to-alls per layer and pass of the slots that a device has (GShard, arXiv:2006.16668, section
    3.1), and with each activation, and each cotangent, two numbers per expert in f32 for the balance."""
    found = sent(compiled(on, "expert", experts="capacity 1.25"))
    X, K = MIXTURE.num_experts, MIXTURE.experts_per_token
    slots = X * ceil(Fraction(5, 4) * TOKENS * K / X)
    rows = slots * MODEL.embed * element_bytes(on)
    assert (
        found.pop(("expert", "all-to-all")) == Fraction(WAYS - 1, WAYS) * rows * 2 * (FORWARDS + 1) * LAYERS
    )
    assert near(found.pop(("stage", "collective-permute")), passed_on(on, 2 * X * F32_BYTES))
    # What belongs to no expert is as data parallel, and its gradients are reduced for every microbatch.
    assert {key for key in found if "stage" not in key[0]} <= {("expert", "all-reduce")}
    assert {kind for axes, kind in found if "stage" in axes} <= {"all-reduce"}
