"""The search: what is tried in which round, and what is left out before it is compiled."""

from __future__ import annotations

import io

from case_reports import analysis, memory

from shardlab.case_report import CaseReport
from shardlab.lab.cases import Question
from shardlab.lab.run import Steps
from shardlab.lab.search import search_plans
from shardlab.program import Program
from shardlab.spec.case import Case
from shardlab.spec.plan import plan_from_text

TENSOR_SECONDS = {1: 3.0, 2: 1.0, 4: 2.0, 8: 4.0}  # by the width of tensor parallelism


def report(case: Case, program: Program) -> CaseReport:
    seconds = TENSOR_SECONDS[case.plan.axes.get("tensor", 1)] / (1 if case.plan.method.remat == "full" else 2)
    return CaseReport(
        case=case, program=program, analysis=analysis(), memory=memory(), communication_s=seconds
    )


def steps() -> Steps:
    program = Program(name="p", backend="gpu", hlo_text="", num_devices=8)
    return Steps(key=lambda case: case.plan.name, compile=lambda case: program, report=report)


def test_the_best_two_are_tried_with_less_rematerialisation() -> None:
    found = search_plans(
        Question(model="llama3-8b", machines=("h100:1x8",), batch=8), progress=io.StringIO(), steps=steps()
    )
    ranked = [one.case.plan.name for one in found.comparison.ranked]
    # fsdp4-tensor2 (1 s) and fsdp2-tensor4 (2 s) lead the first round; half of that with less.
    assert set(ranked[:2]) == {"fsdp4-tensor2-matmuls", "fsdp4-tensor2-none"}
    assert {"fsdp2-tensor4-matmuls", "fsdp2-tensor4-none"} < set(ranked)
    assert len(ranked) == 4 + 4
    best = found.comparison.ranked[0].case.plan
    assert plan_from_text(found.texts[best.name], best.name) == best


def test_state_that_cannot_fit_is_not_compiled() -> None:
    compiled: list[str] = []
    wanted = steps()
    program = wanted.compile

    def compile_(case: Case) -> Program:
        compiled.append(case.plan.name)
        return program(case)

    found = search_plans(
        Question(model="llama3-405b", machines=("h100:1x8",), batch=8),
        progress=io.StringIO(),
        steps=Steps(key=wanted.key, compile=compile_, report=wanted.report),
    )
    assert compiled == []
    assert all("optimizer state alone" in row.reason for row in found.comparison.unranked)
    assert len(found.comparison.unranked) == 4
