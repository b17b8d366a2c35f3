"""What a machine's shape suggests: every grid uses all devices, and the texts are mesh files."""

from __future__ import annotations

from math import prod

import pytest

from shardlab.hardware.catalog import load_machine
from shardlab.spec.candidates import candidate, candidates, state_bytes
from shardlab.spec.case import make_case
from shardlab.spec.models import MODELS
from shardlab.spec.names import strategy_names
from shardlab.spec.param_counts import num_params
from shardlab.spec.plan import plan_from_text

MACHINES = ("h100:1x8", "h100:64x8", "v5p:4x4x4", "v5e:8x8*2", "rtx4090:1x2", "a100:16x8")


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("model", ["gpt2-124m", "llama3-70b", "mixtral-8x7b"])
def test_grids_use_every_device_once_and_can_be_kept(machine: str, model: str) -> None:
    made = candidates(MODELS[model], load_machine(machine))
    names = [one.plan.name for one in made]
    assert len(set(names)) == len(names) >= 1
    for one in made:
        assert prod(one.plan.axes.values()) == load_machine(machine).num_devices
        assert one.plan.on == machine
        assert plan_from_text(one.text, one.plan.name) == one.plan


def test_tensor_parallelism_stays_inside_the_fastest_domain() -> None:
    sizes = {
        one.plan.axes.get("tensor", 1) for one in candidates(MODELS["llama3-70b"], load_machine("h100:64x8"))
    }
    assert sizes == {1, 2, 4, 8}
    assert {
        one.plan.axes.get("tensor", 1) for one in candidates(MODELS["gpt2-124m"], load_machine("h100:8x8"))
    } == {
        1,
        2,
        4,
    }  # 12 heads


def test_names_are_the_fields() -> None:
    found = {
        ", ".join(strategy_names(one.plan))
        for one in candidates(MODELS["llama3-70b"], load_machine("h100:8x8"))
    }
    assert {
        "FSDP",
        "HSDP",
        "FSDP, tensor parallel, sequence parallel (Megatron)",
        "data parallel, tensor parallel, sequence parallel (Megatron), pipeline parallel (1F1B)",
    } <= found
    experts = {
        name
        for one in candidates(MODELS["mixtral-8x7b"], load_machine("h100:8x8"))
        for name in strategy_names(one.plan)
    }
    assert "expert parallel" in experts


def test_state_is_twelve_bytes_a_parameter_over_the_devices_that_share_it() -> None:
    model = MODELS["llama3-8b"]
    whole = 12 * num_params(model, padded=True)
    case = make_case(candidate({"fsdp": 8}, "h100:1x8", "full").plan, model)
    assert state_bytes(case) == whole // 8
    copies = make_case(candidate({"data": 2, "fsdp": 4}, "h100:2x4", "full").plan, model)
    assert state_bytes(copies) == whole // 4
