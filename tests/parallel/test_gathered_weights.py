"""Whatever the remat policy, no weight is kept gathered for the backward pass: that would be the model."""

from __future__ import annotations

from pathlib import Path

import pytest
from compiled_plans import scheduled_case

from shardlab.analysis import analyze
from shardlab.spec.case import make_case
from shardlab.spec.plan import load_plan

FSDP = Path(__file__).parents[2] / "meshes" / "cpu8-fsdp.toml"
MATRICES = {f"attention/{name}" for name in ("query", "key", "value", "output")} | {
    f"mlp/{name}" for name in ("gate", "up", "down")
}


@pytest.mark.parametrize("remat", ["none", pytest.param("matmuls", marks=pytest.mark.matrix)])
def test_weights_are_gathered_again(remat: str) -> None:
    plan = load_plan(FSDP)
    plan = plan.model_copy(update={"method": plan.method.model_copy(update={"remat": remat})})
    program = scheduled_case(make_case(plan, model="tiny", batch=8, seq=256))
    for phase in ("forward", "backward"):
        gathered = {
            row.layer.removeprefix("layers/")
            for row in analyze(program).collectives
            if row.kind == "all-gather" and row.phase == phase
        }
        assert gathered >= MATRICES, phase
