"""Whatever a file holds, loading it gives a plan or a UserError with one-line problems."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from shardlab.errors import Infeasible, UserError
from shardlab.spec.case import make_case
from shardlab.spec.names import strategy_names
from shardlab.spec.plan import Plan, plan_from_text
from shardlab.spec.plan_checks import ACTIVATION_AXES, PARAM_AXES

MESH_AXES = ("data", "fsdp", "tensor")
scalars = st.one_of(
    st.integers(), st.booleans(), st.text(max_size=8), st.floats(allow_nan=False, allow_infinity=False)
)
words = st.one_of(scalars, st.lists(scalars, max_size=3), st.just({}))


def rules(logical: tuple[str, ...]) -> st.SearchStrategy[Any]:
    split = st.lists(st.sampled_from(MESH_AXES), max_size=2)
    return st.dictionaries(st.sampled_from(logical), st.one_of(split, split, split, words), max_size=4)


def sometimes(table: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Mostly the table, at times anything at all."""
    return st.one_of(table, table, table, words)


axes = st.dictionaries(st.sampled_from(MESH_AXES), st.sampled_from([1, 2, 4, 8, 0]), min_size=1)
plans = st.fixed_dictionaries(
    {"axes": sometimes(axes)},
    optional={
        "on": st.sampled_from(["cpu:8", "h100:8x8", "v5e:2x2", "nothing"]),
        "order": st.one_of(st.sampled_from(["make_mesh", "row-major"]), st.permutations(range(8)), words),
        "params": sometimes(rules(PARAM_AXES)),
        "activations": sometimes(rules(ACTIVATION_AXES)),
        "optimizer": sometimes(rules(PARAM_AXES)),
        "method": sometimes(st.dictionaries(st.sampled_from(["accumulate", "remat", "context"]), words)),
        "compiler": sometimes(st.fixed_dictionaries({"flags": st.one_of(st.lists(st.text()), words)})),
        "check": sometimes(st.dictionaries(st.sampled_from(["model", "batch", "seq"]), words)),
        "blocks": words,
        "description": words,
    },
)


def toml(table: dict[str, Any]) -> str:
    """TOML of a table of JSON values: strings, numbers and lists are written alike in both."""
    return "\n".join(f"{key} = {inline(value)}" for key, value in table.items())


def inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {inline(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(inline, value)) + "]"
    return json.dumps(value).replace("\x7f", "\\u007f")


@given(plans)
def test_a_plan_or_a_user_error(table: dict[str, Any]) -> None:
    try:
        plan = plan_from_text(toml(table), "fuzz")
    except UserError as error:
        assert error.problems
        assert all("\n" not in str(problem) for problem in error.problems)
        return
    assert Plan.model_validate_json(plan.model_dump_json()) == plan
    assert strategy_names(plan)
    try:
        case = make_case(plan, "tiny", f"cpu:{plan.num_devices}")
    except Infeasible as error:
        assert error.nearest
        return
    assert case.batch % plan.method.accumulate == 0


@given(st.one_of(st.text(), st.text(alphabet="[]{}=.\"'\n #axeson0123,")))
def test_any_text_at_all(text: str) -> None:
    try:
        assert isinstance(plan_from_text(text, "fuzz"), Plan)
    except UserError as error:
        assert error.problems
