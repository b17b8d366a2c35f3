"""Plans put on models and machines: defaults, mistakes, and what is infeasible with its reason."""

from __future__ import annotations

import dataclasses

import pytest

from shardlab.errors import Infeasible, UserError
from shardlab.spec.case import Case, Workload, make_case
from shardlab.spec.models import MODELS
from shardlab.spec.plan import Plan, plan_from_text

HYBRID = """
on = "cpu:8"
[axes]
data = 2
tensor = 4
[params]
heads = ["tensor"]
kv_heads = ["tensor"]
mlp = ["tensor"]
vocab = ["tensor"]
[activations]
batch = ["data"]
"""


def plan_of(axes: dict[str, int], **tables: object) -> Plan:
    return Plan.model_validate({"name": "p", "axes": axes, **tables})


def test_what_is_not_said_has_a_default() -> None:
    case = make_case(plan_from_text(HYBRID), "llama3-8b")
    assert (case.machine, case.batch, case.seq, case.workload) == ("cpu:8", 2, 4_096, "train")
    assert make_case(plan_from_text(HYBRID), "gpt2-124m").seq == 1_024


def test_check_gives_defaults_and_the_caller_overrides_them() -> None:
    plan = plan_from_text(HYBRID + '[check]\nmodel = "llama3-8b"\nbatch = 16\nseq = 512\n')
    assert make_case(plan).model is MODELS["llama3-8b"]
    assert (make_case(plan).batch, make_case(plan).seq) == (16, 512)
    assert (make_case(plan, batch=4).batch, make_case(plan, seq=64).seq) == (4, 64)
    assert make_case(plan, "tiny").seq == 256, (
        "the plan's seq is for its own model: no longer than the context"
    )


def test_accumulation_needs_a_sequence_for_each_microbatch() -> None:
    plan = plan_from_text(HYBRID + "[method]\naccumulate = 3\n")
    assert make_case(plan, "tiny").batch == 6
    with pytest.raises(Infeasible, match=r"^8 sequences in 3 microbatches over 2 devices.*: 6 or 12$"):
        make_case(plan, "tiny", batch=8)


def test_a_model_of_ones_own() -> None:
    own = dataclasses.replace(MODELS["tiny"], name="own", layers=3)
    assert make_case(plan_from_text(HYBRID), own).model.layers == 3


def test_a_case_goes_to_json_and_back() -> None:
    case = make_case(plan_from_text(HYBRID), "gpt2-124m", workload="prefill")
    assert Case.model_validate_json(case.model_dump_json()) == case


def test_the_same_case_on_another_machine() -> None:
    case = make_case(plan_from_text(HYBRID), "tiny")
    assert case.on("h100:1x8").machine == "h100:1x8"
    assert case.on("attached").machine == "attached:8"
    assert case.on("h100:1x8").load_machine().chip.name == "H100 80GB SXM5"
    with pytest.raises(UserError) as caught:
        case.on("h100:8x8")
    assert str(caught.value) == (
        "plan: the plan has data 2 x tensor 4 = 8 devices, but h100:8x8 has 64; "
        "choose a machine with 8 devices, or another plan"
    )


def test_both_mistakes_of_a_command_at_once() -> None:
    with pytest.raises(UserError) as caught:
        make_case(plan_from_text(HYBRID), "gpt3", "h100:9x9x9")
    assert [problem.where for problem in caught.value.problems] == ["--model", "machine 'h100:9x9x9'"]


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        pytest.param(HYBRID, {}, "plan: no model; give --model, or [check] model in the plan", id="model"),
        pytest.param(
            "axes = {x = 1}",
            {"model": "tiny"},
            "plan: no machine; give --on, or on = … in the plan",
            id="machine",
        ),
        pytest.param(HYBRID, {"model": "tiny", "batch": 0}, "--batch: 0; use 1 or more", id="batch"),
        pytest.param(HYBRID, {"model": "tiny", "seq": -4}, "--seq: -4; use 1 or more", id="seq"),
    ],
)
def test_mistakes(text: str, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        make_case(plan_from_text(text), **arguments)  # type: ignore[arg-type]
    assert str(caught.value) == message


TENSOR8 = {"heads": ("tensor",), "kv_heads": ("tensor",), "mlp": ("tensor",), "vocab": ("tensor",)}


@pytest.mark.parametrize(
    ("plan", "model", "numbers", "message"),
    [
        pytest.param(
            plan_of({"tensor": 8}, params=TENSOR8), "gpt2-124m", {},
            "12 heads over 8 devices (tensor); nearest size that divides: 6", id="12 heads over 8",
        ),
        pytest.param(
            plan_of({"tensor": 4}, params=TENSOR8), "gpt2-1.5b", {},
            "25 heads over 4 devices (tensor); nearest size that divides: 1",
            id="5 divides 25 heads, and not the padded vocabulary",
        ),
        pytest.param(
            plan_of({"tensor": 5}, params=TENSOR8), "gpt2-1.5b", {},
            "vocab of 50304 over 5 devices (tensor); nearest size that divides: 1",
            id="heads divide, the padded vocabulary does not",
        ),
        pytest.param(
            plan_of({"fsdp": 7}, params={"embed": ("fsdp",)}), "tiny", {},
            "embed of 128 over 7 devices (fsdp); nearest size that divides: 8", id="embed",
        ),
        pytest.param(
            plan_of({"fsdp": 7}, optimizer={"embed": ("fsdp",)}), "tiny", {},
            "embed of 128 over 7 devices (fsdp); nearest size that divides: 8", id="the optimizer's alone",
        ),
        pytest.param(
            plan_of({"data": 8}, activations={"batch": ("data",)}), "tiny", {"batch": 12},
            "12 sequences over 8 devices (data); nearest batch that divides: 8 or 16", id="batch",
        ),
        pytest.param(
            plan_of({"tensor": 8}, activations={"norm_seq": ("tensor",)}), "tiny", {"seq": 100},
            "norm_seq of 100 over 8 devices (tensor); nearest seq that divides: 96 or 104", id="sequence",
        ),
        pytest.param(
            plan_of({"tensor": 8}, activations={"mlp": ("tensor",)}), "gpt2-124m", {"seq": 2_000},
            "2000 tokens with 1024 learned positions (gpt2-124m); seq at most 1024", id="learned positions",
        ),
        pytest.param(
            plan_of({"stack": 8}, params={"layers": ("stack",)}), "gpt2-124m", {},
            "12 layers over 8 devices (stack); nearest size that divides: 6", id="layers",
        ),
        pytest.param(
            plan_of({"tensor": 8, "data": 3}, params=TENSOR8, activations={"batch": ("data",)}),
            "gpt2-124m", {"batch": 4},
            "12 heads over 8 devices (tensor); 4 sequences over 3 devices (data); "
            "nearest size that divides: 6; nearest batch that divides: 3 or 6", id="two reasons",
        ),
    ],
)  # fmt: skip
def test_infeasible_with_the_reason(plan: Plan, model: str, numbers: dict[str, int], message: str) -> None:
    with pytest.raises(Infeasible) as caught:
        make_case(plan, model, f"cpu:{plan.num_devices}", **numbers)  # type: ignore[arg-type]
    assert str(caught.value) == message


def test_kv_heads_fewer_than_the_tensor_axis_are_replicated_and_told() -> None:
    plan = plan_of({"tensor": 16}, params=TENSOR8)
    case = make_case(plan, "llama3-70b", "v5e:4x4")
    assert case.notes() == ("8 KV heads over 16 devices (tensor): the KV heads are replicated",)
    assert make_case(plan_of({"tensor": 8}, params=TENSOR8), "llama3-70b", "cpu:8").notes() == ()


def test_the_workload_is_the_plans_unless_said() -> None:
    plan = plan_from_text(HYBRID + '[check]\nworkload = "prefill"\n')
    assert make_case(plan, "gpt2-124m").workload == "prefill"
    assert make_case(plan, "gpt2-124m", workload="train").workload == "train"


@pytest.mark.parametrize(
    ("workload", "feasible"),
    [("train", False), ("prefill", False), ("decode", True)],
)
def test_a_decode_step_has_one_token_that_no_rule_splits(workload: Workload, feasible: bool) -> None:
    plan = plan_of({"tensor": 8}, activations={"norm_seq": ("tensor",)})
    if feasible:
        assert make_case(plan, "tiny", "cpu:8", seq=100, workload=workload).workload == workload
        return
    with pytest.raises(Infeasible):
        make_case(plan, "tiny", "cpu:8", seq=100, workload=workload)


def test_unrolled_layers_have_no_layer_dimension() -> None:
    plan = plan_of({"stack": 8}, params={"layers": ("stack",)})
    assert not make_case(plan, "gpt2-124m", "cpu:8", scan_layers=False).scan_layers
