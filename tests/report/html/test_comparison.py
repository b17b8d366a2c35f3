"""The HTML of a comparison and of a diff: the answer first, what was left out said."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
from case_reports import GB, collective, emulated, infeasible_report, report
from review.analyses import made_of
from timelines import block, gather, kernel, line

from shardlab.case_report import CaseReport
from shardlab.compare import rank
from shardlab.prediction import Prediction
from shardlab.report.html import comparison
from shardlab.report.html.comparison import comparison_report, step_chart
from shardlab.report.html.parts import Chart, Listing
from shardlab.report.html.review import before_after_chart, change_listing, change_report, diff_report
from shardlab.report.html.write import html_of
from shardlab.review import diff
from shardlab.review.change import Change, PlanDiff


def predicted(name: str, step_s: float) -> CaseReport:
    """A step that computes for half of its time and communicates, exposed, for a quarter."""
    whole = line(block(step_s, kernel(0.0, step_s / 2), gather(step_s / 2, step_s / 4)))
    known = replace(
        whole, compute_s=step_s / 2, exposed_communication_s=step_s / 4, communication_s=step_s / 4
    )
    return report(name, predicted=Prediction(timeline=known, basis=()))


def drawn(chart: Chart) -> list[tuple[str, str, float]]:
    data = chart.wide["data"]
    assert isinstance(data, dict)
    return [(row["bar"], row["series"], row["value"]) for row in data["values"]]


def test_the_best_plan_is_the_title_and_the_next_one_is_so_far_behind() -> None:
    """4 s and 5 s: a quarter longer."""
    made = comparison_report(rank([predicted("slow", 5.0), predicted("fast", 4.0)]))
    assert made.title == "Best: fast on h100:1x8"
    assert made.verdict.startswith("4 s a step, 25 % of it exposed communication")
    assert made.verdict.endswith("The next, slow on h100:1x8, takes 25 % longer.")
    assert [tab.title for tab in made.tabs] == ["Overview", "fast", "slow"]


def test_a_step_is_compute_exposed_communication_and_the_rest() -> None:
    (chart,) = step_chart([predicted("a", 4.0)])
    assert drawn(chart) == [("a", "compute", 2.0), ("a", "exposed communication", 1.0), ("a", "waiting", 1.0)]


def test_plans_without_a_tab_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "PLANS", 2)
    made = comparison_report(rank([predicted(f"p{n}", n + 1.0) for n in range(5)]))
    assert len(made.tabs) == 3
    assert "3 more plans have no tab here" in html_of(made)


@pytest.mark.parametrize(
    ("reports", "said"),
    [
        ([emulated("e", 3)], "No plan is ranked"),
        ([infeasible_report("6 heads over 4 devices")], "infeasible: 6 heads over 4 devices"),
        ([predicted("good", 1.0), infeasible_report("6 heads over 4 devices")], "6 heads over 4 devices"),
    ],
    ids=["emulated", "infeasible", "some"],
)
def test_plans_without_a_rank_are_there(reports: list[CaseReport], said: str) -> None:
    assert said in html_of(comparison_report(rank(reports)))


def test_a_change_is_drawn_beside_what_it_was() -> None:
    """7 GB twice over fsdp becomes thrice; 1 GB over tensor is new."""
    base = made_of([collective("a")])
    head = made_of(
        [
            collective("a", executions=(3, 3)),
            collective("b", axes=("tensor",), wire_bytes=Fraction(GB), executions=(1, 1)),
        ]
    )
    found = diff(base, head)
    (chart,) = before_after_chart(found)
    values = {bar: value for bar, series, value in drawn(chart) if series == "forward"}
    assert values == {"fsdp, base": 14.0, "fsdp, head": 21.0, "tensor, base": 0.0, "tensor, head": 1.0}
    (listing,) = change_listing(found)
    assert isinstance(listing, Listing)
    assert [(item.keys[0], item.keys[2], item.order[2]) for item in listing.items] == [
        ("grew", "fsdp", 7.0 * GB),
        ("added", "tensor", 1.0 * GB),
    ]
    assert diff_report(found).verdict in html_of(diff_report(found)).replace("&#39;", "'")


def test_a_change_has_a_tab_for_each_plan_that_changed() -> None:
    base, head = made_of([collective("a")]), made_of([collective("a", executions=(3, 3))])
    diffs = (
        PlanDiff(plan="meshes/same.toml", machine="h100:1x8", found=diff(base, base)),
        PlanDiff(plan="meshes/worse.toml", machine="h100:1x8", found=diff(base, head)),
    )
    made = change_report(Change(base="main", head="HEAD", diffs=diffs, limits=("budget raised",)))
    assert [tab.title for tab in made.tabs] == ["Overview", "worse on h100:1x8"]
    text = html_of(made)
    assert "budget raised" in text and "meshes/same.toml" in text and "bytes sent +7 GB (+50 %)" in text


def test_nothing_changed_is_said() -> None:
    same = made_of([collective("a")])
    text = html_of(diff_report(diff(same, same)))
    assert "Nothing changed." in text and "No change" in text
