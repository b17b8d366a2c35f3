"""Whatever a file holds, loading it gives a plan or a UserError with one-line problems."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from shardlab.errors import Infeasible, UserError
from shardlab.hardware.catalog import MAX_DEVICES
from shardlab.spec.case import make_case
from shardlab.spec.models import MODELS
from shardlab.spec.names import strategy_names
from shardlab.spec.plan import Plan, plan_from_text
from shardlab.spec.plan_checks import ACTIVATION_AXES, PARAM_AXES

MESH_AXES = ("data", "fsdp", "tensor")
scalars = st.one_of(
    st.integers(), st.booleans(), st.text(max_size=8), st.floats(allow_nan=False, allow_infinity=False)
)
words = st.one_of(scalars, st.lists(scalars, max_size=3), st.just({}))


def rules(logical: tuple[str, ...]) -> st.SearchStrategy[Any]:
    split = st.lists(st.sampled_from(MESH_AXES), max_size=2, unique=True)
    return st.dictionaries(st.sampled_from(logical), split, max_size=2)


axes = st.fixed_dictionaries({name: st.sampled_from([1, 2, 4]) for name in MESH_AXES})
likely = {  # each of these alone is right; together they may not be
    "axes": axes,
    "order": st.sampled_from(["make_mesh", "row-major"]),
    "params": rules(PARAM_AXES),
    "activations": rules(ACTIVATION_AXES),
    "optimizer": rules(PARAM_AXES),
    "method": st.fixed_dictionaries(
        {"accumulate": st.integers(1, 3), "remat": st.sampled_from(["none", "full"])}
    ),
    "compiler": st.fixed_dictionaries({"flags": st.just(["--xla_x=1"])}),
    "check": st.fixed_dictionaries({"model": st.sampled_from(list(MODELS)), "batch": st.integers(1, 64)}),
}
wrong = {
    "on": st.sampled_from(["cpu:8", "h100:8x8", "nothing", 3]),
    "axes": st.dictionaries(st.sampled_from(MESH_AXES), st.one_of(st.integers(), words)),
    "order": st.one_of(st.permutations(range(8)), words),
    "params": st.dictionaries(
        st.sampled_from(PARAM_AXES), st.one_of(words, st.lists(st.sampled_from(MESH_AXES)))
    ),
    "activations": words,
    "optimizer": words,
    "method": st.dictionaries(st.sampled_from(["accumulate", "remat", "context", "pipeline", "odd"]), words),
    "compiler": st.fixed_dictionaries({"flags": st.one_of(st.lists(st.text()), words)}),
    "check": st.dictionaries(st.sampled_from(["model", "batch", "seq"]), words),
    "blocks": st.one_of(words, st.dictionaries(st.sampled_from(["moe", "odd"]), words)),
    "description": words,
    "odd": words,
}
right = st.fixed_dictionaries(
    {"axes": axes}, optional={key: value for key, value in likely.items() if key != "axes"}
)
plans = st.one_of(
    right,
    st.builds(dict.__or__, right, st.fixed_dictionaries({}, optional=wrong)),
    st.fixed_dictionaries(wrong),
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


@example({"axes": {"data": MAX_DEVICES + 1}})
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
        case = make_case(plan, plan.check.model or "tiny", f"cpu:{plan.num_devices}")
    except Infeasible as error:
        assert error.nearest
        return
    except UserError as error:  # no machine has so many devices
        assert plan.num_devices > MAX_DEVICES
        assert "number of devices" in str(error)
        return
    assert case.batch % plan.method.accumulate == 0


@given(st.one_of(st.text(), st.text(alphabet="[]{}=.\"'\n #axeson0123,")))
def test_any_text_at_all(text: str) -> None:
    try:
        assert isinstance(plan_from_text(text, "fuzz"), Plan)
    except UserError as error:
        assert error.problems
