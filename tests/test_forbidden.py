"""The collectives that each strategy may not have, in one table, on programs of all three targets."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from compiled_plans import scheduled_case
from emulated import asked

from shardlab.analysis import CollectiveRow, analyze
from shardlab.spec.case import make_case
from shardlab.spec.models import find_model
from shardlab.spec.plan import Plan

MODEL = replace(find_model("tiny"), name="tiny-grouped", layers=4, kv_heads=4)
MIXTURE = replace(MODEL, name="tiny-mixture", num_experts=8, experts_per_token=2, balance_coefficient=0.02)
MOVES = ("all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
RESHARDS, REDUCED = ("all-to-all", "collective-permute"), ("all-reduce",)
BATCH, SEQ = 16, 256
STREAM_BYTES = BATCH * SEQ * MODEL.embed // 8  # a quarter of a device's residual stream in bf16, batch over 2
WEIGHT_BYTES = 4 * MODEL.embed  # the smallest parameter is a norm's scale in f32; smaller things are scalars


@dataclass(frozen=True)
class Forbidden:
    """No collective of these kinds over this mesh axis, of more than `above` bytes of payload, in layers
    whose path has `within`. on: the targets where that holds; why: what it would mean.
    """

    kinds: tuple[str, ...]
    axis: str
    why: str
    within: str = ""
    above: int = 0
    on: tuple[str, ...] = ("cpu", "gpu", "tpu")

    def breaks(self, row: CollectiveRow, target: str) -> bool:
        """Whether this collective may not be."""
        return (
            target in self.on
            and row.kind in self.kinds
            and self.axis in (row.axes or ("unknown", self.axis))
            and self.within in (row.layer or "")
            and row.payload_bytes > self.above
        )


@dataclass(frozen=True)
class Strategy:
    """A plan that has it, and what may not appear then."""

    plan: Plan
    forbidden: tuple[Forbidden, ...]
    experts: bool = False


def but(*kinds: str) -> tuple[str, ...]:
    return tuple(kind for kind in (*MOVES, "all-reduce") if kind not in kinds)


def piped(axes: dict[str, int], **method: Any) -> Plan:
    return asked(axes, pipeline="1f1b", microbatches=4, **method)


KERNEL = "attention/kernel"
NO_STAGE = Forbidden(
    but("collective-permute", "all-reduce"), "stage", "weights, states or layers' gradients leave their stage"
)
STRATEGIES = {
    "data parallel": Strategy(
        asked({"data": 8}), (Forbidden(MOVES, "data", "weights are whole, and so are gradients"),)
    ),
    "FSDP": Strategy(
        asked({"fsdp": 8}),
        (
            Forbidden(RESHARDS, "fsdp", "tokens leave their device", on=("cpu", "gpu")),
            # XLA:CPU makes no reduce-scatter, XLA:TPU all-reduces small arrays.
            Forbidden(REDUCED, "fsdp", "gradients are reduced whole", "layers/", WEIGHT_BYTES, on=("gpu",)),
        ),
    ),
    "tensor parallel": Strategy(
        asked({"tensor": 8}),
        (
            Forbidden(MOVES, "tensor", "weights or activations are gathered", "layers/"),
            Forbidden(("all-gather", "all-to-all"), "tensor", "logits are gathered", "head"),
            Forbidden(MOVES, "tensor", "logits are gathered", "loss"),
        ),
    ),
    "sequence parallel (Megatron)": Strategy(
        asked({"data": 2, "tensor": 4}, "seq"),
        (
            Forbidden(RESHARDS, "tensor", "tokens are resharded", on=("cpu", "gpu")),
            Forbidden(REDUCED, "tensor", "activations are reduced", "layers/", STREAM_BYTES, on=("gpu",)),
        ),
    ),
    "context parallel (ring)": Strategy(
        asked({"context": 8}, context="ring"),
        (
            Forbidden(but("collective-permute"), "context", "keys and values are gathered", KERNEL),
            Forbidden(MOVES, "context", "tokens change their device", "mlp"),
        ),
    ),
    "context parallel (all-gather)": Strategy(
        asked({"context": 8}, context="all-gather"),
        (
            Forbidden(RESHARDS, "context", "keys hop", KERNEL),
            Forbidden(MOVES, "context", "tokens change their device", "mlp"),
        ),
    ),
    "context parallel (Ulysses)": Strategy(
        asked({"context": 8}, context="ulysses"),
        (
            Forbidden(but("all-to-all"), "context", "keys and values are gathered", KERNEL),
            Forbidden(MOVES, "context", "tokens change their device", "mlp"),
        ),
    ),
    "expert parallel": Strategy(
        asked({"data": 2, "expert": 4}, experts="capacity 1.25"),
        (
            Forbidden(but("all-to-all", "all-reduce"), "expert", "kernels or tokens are gathered"),
            Forbidden(REDUCED, "expert", "gradients of experts are summed over owners", "moe/experts"),
        ),
        experts=True,
    ),
    "pipeline parallel (1F1B)": Strategy(piped({"stage": 4, "data": 2}), (NO_STAGE,)),
    "gathered keys in stages": Strategy(
        piped({"stage": 2, "context": 4}, context="all-gather"),
        (NO_STAGE, Forbidden(RESHARDS, "context", "keys hop, in a branch")),
    ),
    "experts in stages": Strategy(
        piped({"stage": 2, "expert": 4}, experts="capacity 1.25"),
        (NO_STAGE, Forbidden(but("all-to-all", "all-reduce"), "expert", "kernels or tokens are gathered")),
        experts=True,
    ),
}  # fmt: skip
MACHINES = {"cpu": "cpu:8", "gpu": "h100:1x8", "tpu": "v5e:2x4"}
ALWAYS = {("pipeline parallel (1F1B)", "cpu")}


def broken(rows: Iterable[CollectiveRow], rules: Iterable[Forbidden], target: str) -> list[str]:
    """What may not appear and does."""
    return [
        f"{row.kind} {row.name} over {row.axes} in {row.layer}: {rule.why}"
        for rule in rules
        for row in rows
        if rule.breaks(row, target)
    ]


def marks(name: str, target: str) -> list[pytest.MarkDecorator]:
    family = {"gpu": [pytest.mark.gpu], "tpu": [pytest.mark.tpu]}.get(target, [])
    return [*family, pytest.mark.matrix if (name, target) in ALWAYS else pytest.mark.full]


@pytest.mark.parametrize(
    ("name", "target"),
    [
        pytest.param(name, target, marks=marks(name, target), id=f"{name}-{target}")
        for name in STRATEGIES
        for target in MACHINES
    ],
)
def test_what_may_not_appear(name: str, target: str) -> None:
    strategy = STRATEGIES[name]
    model = MIXTURE if strategy.experts else MODEL
    # The unfused attention has no collective either, and compiles in half the time.
    method = strategy.plan.method
    if method.context == "none":
        method = method.model_copy(update={"attention": "reference"})
    plan = strategy.plan.model_copy(update={"method": method})
    case = make_case(plan, model, MACHINES[target], BATCH, SEQ)
    rows = analyze(scheduled_case(case)).collectives
    assert rows
    assert broken(rows, strategy.forbidden, target) == []
