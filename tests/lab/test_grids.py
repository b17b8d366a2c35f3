"""The search over grids for a step of the user's own."""

from __future__ import annotations

import io

import pytest
from case_reports import analysis, memory

from shardlab.case_report import CaseReport
from shardlab.cli import main
from shardlab.errors import CompileFailed, UserError
from shardlab.lab.cases import Question
from shardlab.lab.grids import search_grids
from shardlab.lab.run import Steps
from shardlab.program import Program
from shardlab.spec.plan import plan_from_text
from shardlab.spec.step import AnyCase

STEP = "mine:make_step"
SECONDS = {1: 3.0, 2: 1.0, 4: 2.0, 8: 4.0}  # by the size of the second axis


def compiled(case: AnyCase) -> Program:
    if case.plan.axes["tensor"] == 8:
        raise CompileFailed("it", "8 does not divide 12")
    return Program(name="p", backend="gpu", hlo_text="", num_devices=8)


def report(case: AnyCase, program: Program) -> CaseReport:
    seconds = SECONDS[case.plan.axes["tensor"]]
    return CaseReport(
        case=case, program=program, analysis=analysis(), memory=memory(), communication_s=seconds
    )


STEPS = Steps(key=lambda case: case.plan.name, compile=compiled, report=report)


def search(machine: str, *names: str, steps: Steps = STEPS) -> object:
    question = Question(step=STEP, machines=(machine,), batch=4)
    return search_grids(question, names, progress=io.StringIO(), steps=steps)


def test_every_grid_is_tried_and_the_best_is_a_mesh_file() -> None:
    question = Question(step=STEP, machines=("h100:1x8",), batch=4)
    found = search_grids(question, ["data", "tensor"], progress=io.StringIO(), steps=STEPS)
    ranked = [one.case.plan.name for one in found.comparison.ranked]
    assert ranked == ["data4-tensor2", "data2-tensor4", "data8"]
    assert [row.report.case.plan.name for row in found.comparison.unranked] == ["tensor8"]
    assert "8 does not divide 12" in found.comparison.unranked[0].reason
    best = plan_from_text(found.texts["data4-tensor2"])
    assert (dict(best.axes), best.on, best.check.step) == ({"data": 4, "tensor": 2}, "h100:1x8", STEP)


def test_of_twelve_devices_all_factorisations_in_order() -> None:
    """12 = 2 · 2 · 3 over two axes: six divisors."""
    tried: list[dict[str, int]] = []

    def note(case: AnyCase) -> Program:
        tried.append(dict(case.plan.axes))
        raise CompileFailed("it", "no")

    with pytest.raises(CompileFailed, match="mine:make_step: it: no"):
        search("cpu:12", "data", "tensor", steps=Steps(key=STEPS.key, compile=note, report=report))
    sizes = sorted((grid["data"], grid["tensor"]) for grid in tried)
    assert sizes == [(1, 12), (2, 6), (3, 4), (4, 3), (6, 2), (12, 1)]


@pytest.mark.parametrize(
    ("machine", "names", "says"),
    [
        ("h100:1x8", (), "--axes: no mesh axes; name those of your step: --axes data,tensor"),
        ("h100:64x8", ("a", "b", "c", "d"), "--axes: 220 grids of 4 axes, of which at most 100 are tried"),
    ],
)
def test_mistakes(machine: str, names: tuple[str, ...], says: str) -> None:
    """512 = 2^9 over four axes: (9 + 3 choose 3) = 220 grids."""
    with pytest.raises(UserError) as caught:
        search(machine, *names)
    assert str(caught.value).startswith(says)


def test_axes_are_for_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "--model", "tiny", "--on", "cpu:8", "--axes", "data"]) == 2
    assert "--axes: is for --step" in capsys.readouterr().err
