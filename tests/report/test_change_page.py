"""One comment for many plans: what is in it, in which order, and that it fits whatever plans are called."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
from case_reports import analysis, collective, memory, report

from shardlab.report.change import change_comment, change_page
from shardlab.report.diff import COMMENT_CHARACTERS
from shardlab.review import Side, diff
from shardlab.review.change import Change, PlanDiff, change_json
from shardlab.review.sides import side_of_report

GB = 10**9
ABSENT = Side(name="x", analysis=None, why_not="there is no such plan", absent=True)


def sending(gb: int, layers: int = 1, name: str = "layer") -> Side:
    rows = [
        collective(
            name=f"all-gather.{n}",
            executions=(1, 1),
            wire_bytes=Fraction(gb * GB),
            layer=f"{name}{n}",
            source=f"{name}{n}.py:1",
        )
        for n in range(layers)
    ]
    return side_of_report(report(analysis=analysis(*rows), memory=memory()))


def plan_diff(plan: str, base: Side, head: Side) -> PlanDiff:
    return PlanDiff(plan=plan, machine="h100:1x8", found=diff(base, head))


def change(*diffs: PlanDiff, **known: tuple[str, ...]) -> Change:
    return Change(base="main (1234567)", head="HEAD (89abcde)", diffs=diffs, **known)


MIXED = (
    plan_diff("b.toml", sending(7), sending(7)),
    plan_diff("c.toml", sending(7), sending(8)),
    plan_diff("d.toml", sending(7), sending(10)),
    plan_diff("e.toml", sending(7), sending(1)),
    plan_diff("f.toml", ABSENT, sending(2)),
    plan_diff("g.toml", sending(3), ABSENT),
)


def test_the_worst_comes_first_and_all_are_counted() -> None:
    page = change_page(change(*MIXED, same=("h.toml", "i.toml")))
    assert dict(page.facts)["verdict"] == (
        "2 worse, 1 added, 1 deleted, 1 better, 1 without a change, 2 untouched"
    )
    assert dict(page.facts)["untouched"] == "h.toml, i.toml"
    (table,) = page.tables
    assert [row[0][0].text[0] for row in table.rows] == list("dcfgeb")
    assert table.rows[2][2][0].text.startswith("Added: bytes sent 2 GB")


def test_what_has_more_to_say_is_folded_under_its_verdict() -> None:
    text = change_comment(change(*MIXED, limits=("budget for x raised",)))
    summaries = [
        line for line in text.splitlines() if line.startswith("<details><summary>") and "toml" in line
    ]
    assert [line.removeprefix("<details><summary>")[0] for line in summaries] == list("dce")
    assert "- budget for x raised" in text
    assert text.count("<details>") == text.count("</details>")
    assert "### What changed" in text


def test_one_plan_has_its_own_verdict_and_none_says_so() -> None:
    assert "verdict**: Worse: bytes sent" in change_comment(change(MIXED[1]))
    assert "verdict**: No plan changed: 1 untouched" in change_comment(change(same=("a.toml",)))


@pytest.mark.parametrize("plans", [30, 300], ids=["thirty", "three hundred"])
def test_a_comment_fits_and_what_it_leaves_out_is_counted(plans: int) -> None:
    made = diff(sending(7, 30), sending(8, 30))
    diffs = [PlanDiff(plan=f"meshes/plan{n}.toml", machine="h100:1x8", found=made) for n in range(plans)]
    text = change_comment(change(*diffs))
    assert len(text) <= COMMENT_CHARACTERS
    rows = sum(line.startswith("| meshes/plan") for line in text.splitlines())
    details = text.count("<details><summary>meshes/plan")
    left_rows, left_details = plans - rows, plans - details
    assert (f"{left_rows} more plans; \\-\\-json has all" in text.replace("--", "\\-\\-")) == (left_rows > 0)
    assert f"{left_details} more changed plans" in text
    assert details > 0


def test_names_that_mean_harm_fit_and_are_inert() -> None:
    """Markdown writes each of these characters as several."""
    name = "<*_@x|`" * 400
    made = replace(diff(sending(7, 40, name), sending(8, 40, name)), notes=(name,) * 100)
    diffs = [PlanDiff(plan=f"{name}{n}", machine=name, found=made) for n in range(60)]
    whole = Change(base=name, head=name, diffs=tuple(diffs), same=(name,) * 100, limits=(name,) * 100)
    text = change_comment(whole)
    assert len(text) <= COMMENT_CHARACTERS
    assert "<*" not in text
    assert len(change_json(whole)["diffs"]) == 60
