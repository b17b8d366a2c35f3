"""Which cases a comparison runs: one model, batch and sequence for all; who cannot take part, and why."""

from __future__ import annotations

import pytest
from case_reports import plan

from shardlab.errors import UserError
from shardlab.lab.cases import Cases, Question, comparison_cases
from shardlab.spec.plan import Check, Plan


def with_check(name: str, size: int, **check: object) -> Plan:
    """A plan whose batch is split over `size` devices, on that many emulated ones."""
    made = plan(name, {"fsdp": size})
    return made.model_copy(update={"on": f"cpu:{size}", "check": Check.model_validate(check)})


def settled(cases: Cases) -> set[tuple[int, int]]:
    return {(case.batch, case.seq) for case in cases.cases}


def test_the_batch_is_the_least_that_all_plans_take() -> None:
    cases = comparison_cases([with_check("a", 4), with_check("b", 6)], Question(model="gpt2-124m"))
    assert settled(cases) == {(12, 1024)}  # lcm(4, 6) sequences; GPT-2's context
    assert cases.notes == ("global batch 12: a multiple of what each plan asks for; --batch N sets it",)


def test_the_batch_of_check_counts_and_the_shortest_sequence_is_taken() -> None:
    plans = [with_check("a", 4, batch=8, seq=512), with_check("b", 4, batch=12, seq=256)]
    cases = comparison_cases(plans, Question(model="gpt2-124m"))
    assert settled(cases) == {(24, 256)}
    assert cases.notes[1] == "sequence 256: the shortest that a plan asks for; --seq N sets it"


def test_a_batch_that_does_not_divide_is_said_and_not_replaced() -> None:
    """cpu:4 with a batch of 6 in [check]: the answer is a reason, not another batch."""
    cases = comparison_cases([with_check("a", 4, batch=6)], Question(model="gpt2-124m"))
    assert cases.cases == ()
    (row,) = cases.rejected
    assert row.case.batch == 6
    assert row.infeasible is not None and "6 sequences" in row.infeasible


def test_what_the_user_says_holds() -> None:
    question = Question(model="gpt2-124m", batch=48, seq=128)
    cases = comparison_cases([with_check("a", 4, batch=8, seq=512), with_check("b", 6)], question)
    assert (settled(cases), cases.notes) == ({(48, 128)}, ())


def test_a_batch_that_a_plan_cannot_split_is_a_row_with_its_reason() -> None:
    question = Question(model="gpt2-124m", batch=8)
    cases = comparison_cases([with_check("four", 4), with_check("six", 6)], question)
    assert [case.plan.name for case in cases.cases] == ["four"]
    (row,) = cases.rejected
    assert row.case.plan.name == "six"
    assert row.infeasible is not None
    assert "8 sequences over 6 devices" in row.infeasible


def test_every_plan_goes_on_every_machine_and_what_does_not_suit_is_a_row() -> None:
    question = Question(model="gpt2-124m", machines=("cpu:4", "h100:1x4", "cpu:8"))
    cases = comparison_cases([with_check("a", 4)], question)
    assert [case.machine for case in cases.cases] == ["cpu:4", "h100:1x4"]
    assert [row.case.machine for row in cases.rejected] == ["cpu:8"]
    assert "cpu:8 has 8" in str(cases.rejected[0].infeasible)


def test_a_plan_that_suits_no_machine_at_all_is_a_mistake() -> None:
    with pytest.raises(UserError, match="cpu:8 has 8"):
        comparison_cases([with_check("a", 4)], Question(model="gpt2-124m", machines=("cpu:8",)))


def test_all_infeasible_is_an_answer() -> None:
    heads = with_check("heads", 8).model_copy(update={"params": {"heads": ("fsdp",)}})
    cases = comparison_cases([heads], Question(model="gpt2-124m"))
    assert cases.cases == ()
    assert "12 heads over 8 devices" in str(cases.rejected[0].infeasible)
    assert (cases.rejected[0].case.batch, cases.rejected[0].case.seq) == (8, 1024)


def test_the_model_may_come_from_the_plans_if_they_agree() -> None:
    both = [with_check(name, 4, model="gpt2-124m") for name in ("a", "b")]
    assert {case.model.name for case in comparison_cases(both, Question()).cases} == {"gpt2-124m"}
    with pytest.raises(UserError, match="--model: the plans do not name one model"):
        comparison_cases([*both, with_check("c", 4, model="tiny")], Question())


def test_the_workload_may_come_from_the_plans_if_they_agree() -> None:
    both = [with_check(name, 4, model="gpt2-124m", workload="decode") for name in ("a", "b")]
    assert {case.workload for case in comparison_cases(both, Question()).cases} == {"decode"}
    mixed = [*both, with_check("c", 4, model="gpt2-124m")]
    with pytest.raises(UserError, match="--workload: the plans are for decode, train"):
        comparison_cases(mixed, Question())
    assert len(comparison_cases(mixed, Question(workload="decode")).cases) == 3


def test_every_unknown_name_is_reported_at_once() -> None:
    plans = [plan("no-machine"), plan("none-either")]
    with pytest.raises(UserError) as caught:
        comparison_cases(plans, Question(model="nope", machines=("nosuch:8", "h100:1x99")))
    assert [problem.where for problem in caught.value.problems][:1] == ["--model"]
    assert len(caught.value.problems) == 3
    with pytest.raises(UserError) as caught:
        comparison_cases(plans, Question(model="tiny"))
    assert [problem.where for problem in caught.value.problems] == ["no-machine", "none-either"]


def test_attached_stands_for_as_many_devices_as_the_plan_has() -> None:
    fits, heads = with_check("fits", 4), with_check("heads", 8)
    heads = heads.model_copy(update={"params": {"heads": ("fsdp",)}})
    cases = comparison_cases([fits, heads], Question(model="gpt2-124m", machines=("attached",)))
    assert [case.machine for case in cases.cases] == ["attached:4"]
    assert [row.case.machine for row in cases.rejected] == ["attached:8"]


def test_an_infeasible_row_knows_whether_its_machine_is_emulated() -> None:
    heads = with_check("heads", 8).model_copy(update={"params": {"heads": ("fsdp",)}})
    question = Question(model="gpt2-124m", machines=("cpu:8", "h100:1x8"))
    assert [row.emulated for row in comparison_cases([heads], question).rejected] == [True, False]
