"""Every shipped mesh file loads and can be put on its model and machine, and its name says what it is."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from shardlab.spec.case import make_case
from shardlab.spec.models import MODELS
from shardlab.spec.names import strategy_names
from shardlab.spec.plan import load_plan
from shardlab.spec.sharding import array_sharding, num_ways

MESHES = sorted((Path(__file__).parents[2] / "meshes").glob("*.toml"))
MESHES = [path for path in MESHES if path.name != "budgets.toml"]


def test_the_plans_that_were_asked_for_are_there() -> None:
    machines = [load_plan(path).on for path in MESHES]
    asked = {
        "cpu:8",
        "h100:1x8",
        "h100:64x8",
        "a100:1x8",
        "b200:1x8",
        "rtx4090:1x2",
        "v5e:16x16",
        "v5p:8x8x8",
    }
    asked |= {"v6e:16x16", "tpu7x:4x4x4", "v5e:8x8*2", "h100:2048x8"}
    asked |= {"a100:1x8", "a100:8x8", "a100:35x8", "a100:64x8"}  # Megatron's
    assert asked <= set(machines)
    assert len(MESHES) >= 18


@pytest.mark.parametrize("path", MESHES, ids=lambda path: path.stem)
def test_a_shipped_plan_makes_its_case(path: Path) -> None:
    plan = load_plan(path)
    case = make_case(plan)
    assert plan.description
    assert (plan.check.model, plan.check.batch, plan.check.seq) == (case.model.name, case.batch, case.seq)
    assert not any(name.startswith("replicated") for name in strategy_names(plan)), "an axis does nothing"


@pytest.mark.parametrize("path", MESHES, ids=lambda path: path.stem)
def test_the_name_gives_the_sizes_of_the_axes(path: Path) -> None:
    plan = load_plan(path)
    named = dict(re.findall(r"(data|fsdp|tensor|stage|expert)(\d+)", path.stem))
    assert {axis: int(size) for axis, size in named.items()}.items() <= plan.axes.items()
    machine = make_case(plan).load_machine()
    count = re.match(r"(?:decode-|prefill-)?(?:cpu|h100x|a100x|b200x|gb200x|rtx4090x)(\d+)", path.stem)
    assert machine.num_devices == (int(count[1]) if count else machine.num_devices)
    words = {
        "tensor": "2-D tensor parallel" if "y" in plan.axes else "tensor parallel",
        "-seq": "sequence parallel (Megatron)",
        "stage": "pipeline parallel",
        "expert": "expert parallel",
        "hsdp": "HSDP",
        "zero1": "ZeRO-1",
        "zero2": "ZeRO-2",
    }
    for word, strategy in words.items():
        assert word not in path.stem or any(name.startswith(strategy) for name in strategy_names(plan))


@pytest.mark.parametrize(
    ("stem", "model"),
    [(path.stem, model) for path in MESHES for model in MODELS if path.stem.endswith(f"-{model}")],
)
def test_a_name_that_ends_in_a_model_says_what_is_compiled(stem: str, model: str) -> None:
    assert load_plan(MESHES[0].with_name(f"{stem}.toml")).check.model == model


@pytest.mark.parametrize(
    ("stem", "state_gib"),
    [
        ("a100x8-tensor8-seq-megatron-22b", 40.62),
        ("a100x64-stage8-tensor8-megatron-175b", 40.93),
        ("a100x280-stage35-tensor8-megatron-530b", 29.30),
        ("a100x512-stage64-tensor8-megatron-1t", 31.13),
    ],
)
def test_the_state_of_megatron_layouts_is_calculons(stem: str, state_gib: float) -> None:
    """Parameters, gradients and optimizer state of one GPU at 16 bytes a parameter: 4 each in f32.

    calculon-ai/calculon calculon/llm/validation.py @caa4b11, for arXiv:2205.05198, figure 1. Within 5 %: our
    tables lie on every stage.
    """
    case = make_case(load_plan(MESHES[0].with_name(f"{stem}.toml")))
    plan, held = case.plan, 0
    for spec in case.parameters():
        split = array_sharding(spec.shape, spec.axes, plan.params, plan.axes)
        held += spec.size // math.prod(num_ways(names, plan.axes) for names in split)
    assert 16 * held / 2**30 == pytest.approx(state_gib, rel=0.05)
