"""The example step functions of experiments/steps: what they send, held to arithmetic.

Emulated devices: f32 throughout, and gradients are all-reduced (2 (n-1)/n of an array, gathers (n-1)/n).
"""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path

import pytest
from compiled_plans import scheduled_case
from own_steps import compiled

from shardlab.analysis import Analysis, analyze
from shardlab.spec.plan import Plan, load_plan
from shardlab.spec.step import make_step_case

ROOT = Path(__file__).parents[2]
STEPS = ROOT / "experiments" / "steps"
F32 = 4
Sent = dict[str, int]


@pytest.fixture(autouse=True)
def imports_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))


def own_plan(name: str) -> Plan:
    plan = load_plan(STEPS / f"{name}.toml")
    return plan if len(plan.axes) > 1 else plan.model_copy(update={"axes": {"fsdp": 8}, "on": "cpu:8"})


def gathered(size: int, n: int) -> int:
    return size * (n - 1) // n


def reduced(size: int, n: int) -> int:
    return 2 * size * (n - 1) // n


def mlp() -> Sent:
    """FSDP without remat: each weight is gathered once, its gradient and the loss reduced once."""
    weight = 256 * 1024 * F32
    return {"fsdp": 2 * gathered(weight, 8) + reduced(2 * weight + F32, 8)}


def linen_model() -> Sent:
    """Megatron: a block's output forward, its input's gradient backward, but for the first block, whose
    input is data. Gradients of what each device holds of the weights over the copies."""
    activation, weights = 32 // 2 * 128 * F32, 4 * 128 * 512 * F32 // 4
    return {"tensor": 3 * reduced(activation, 4), "data": reduced(weights, 2)}


def equinox_model() -> Sent:
    """Three linear layers of 64 x 64 with biases, copied everywhere."""
    return {"fsdp": reduced(3 * (64 * 64 + 64) * F32, 8)}


def trainer() -> Sent:
    """Per layer and microbatch both weights are gathered forward and, with full remat, backward; the output
    is reduced forward and the input's gradient backward. The recomputed output is not: nobody uses it. An
    update reduces the norms of two gradients, a scalar each, over both axes."""
    layer_runs, shard, activation = 16 * 4, 128 * 512 * F32 // 2, 512 // 16 // 4 * 128 * F32
    return {
        "fsdp": layer_runs * (4 * gathered(shard, 4) + 2 * reduced(shard, 4)) + 2 * reduced(F32, 4),
        "tensor": layer_runs * 2 * reduced(activation, 2) + 2 * reduced(F32, 2),
    }


def scanned() -> Sent:
    """Both weights of 32 layers gathered forward and again backward, their gradients and the loss reduced."""
    weights = 32 * 2 * 4096 * 14336 * F32
    return {"fsdp": 2 * gathered(weights, 8) + reduced(weights + F32, 8)}


EXAMPLES = {
    "mlp": ("fsdp8", mlp),
    "linen_model": ("data2-tensor4", linen_model),
    "equinox_model": ("fsdp8", equinox_model),
    "trainer": ("fsdp4-tensor2", trainer),
    "scanned": ("scanned", scanned),
}


def sent(analysis: Analysis) -> dict[str, Fraction]:
    assert all(measure[0] == measure[1] for measure in _wire(analysis).values())
    return {axes: measure[0] for axes, measure in _wire(analysis).items()}


def _wire(analysis: Analysis) -> dict[str, tuple[Fraction, Fraction | None]]:
    return {axes: measures["wire_bytes"] for axes, measures in analysis.totals.by_axes.items()}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_sends_what_arithmetic_says(name: str) -> None:
    plan, expected = EXAMPLES[name]
    program = compiled(f"experiments.steps.{name}:make_step", ROOT, own_plan(plan))
    analysis = analyze(program)
    assert sent(analysis) == expected()
    assert analysis.ledger == ()
    assert program.notes == ()


def test_every_example_is_here() -> None:
    assert {path.stem for path in STEPS.glob("*.py")} == set(EXAMPLES)


def test_phases_and_layers_come_from_the_users_own_names() -> None:
    analysis = analyze(compiled("experiments.steps.trainer:make_step", ROOT, own_plan("fsdp4-tensor2")))
    runs = {
        phase: sum(row.executions[0] for row in analysis.collectives if row.phase == phase)
        for phase in ("forward", "backward", "optimizer", "other")
    }
    # forward: two gathers and a reduction; backward: two gathers, the input's and (combined) the weights'
    # gradients; each 16 x 4 times
    assert {phase: count for phase, count in runs.items() if phase != "optimizer"} == {
        "forward": 3 * 64,
        "backward": 4 * 64,
        "other": 0,
    }
    assert runs["optimizer"] > 0
    assert {row.layer.partition("/")[0] for row in analysis.collectives} == {"layers", "optimizer"}


@pytest.mark.matrix
@pytest.mark.gpu
def test_one_dropped_constraint_costs_on_a_gpu_what_emulated_devices_do_not_show(tmp_path: Path) -> None:
    """README's first comment. As written, bf16 shards are gathered twice and gradients scattered once.
    Without the first constraint the backward pass gathers one of the two weights before it is cast, at twice
    the bytes."""
    here, gone = STEPS / "scanned.py", "cast the shard, then gather"
    lines = here.read_text().splitlines(keepends=True)
    (tmp_path / "dropped.py").write_text("".join(line for line in lines if gone not in line))
    plan = load_plan(STEPS / "scanned.toml")
    weights = 32 * 2 * 4096 * 14336 * 2  # in bf16
    sends = {}
    for machine in ("cpu:8", "h100:1x8"):
        asked = plan.model_copy(update={"axes": {"fsdp": 8}, "on": machine})
        for step, folder in (("experiments.steps.scanned", ROOT), ("dropped", tmp_path)):
            case = make_step_case(asked, f"{step}:make_step", folder=folder)
            sends[machine, step] = sent(analyze(scheduled_case(case)))["fsdp"]
    assert sends["cpu:8", "dropped"] == sends["cpu:8", "experiments.steps.scanned"] == scanned()["fsdp"]
    once = gathered(weights, 8)
    assert sends["h100:1x8", "experiments.steps.scanned"] == 3 * once + reduced(F32, 8)
    assert sends["h100:1x8", "dropped"] == (3 + Fraction(1, 2)) * once + reduced(F32, 8)
