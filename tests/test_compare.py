"""Ranking, by reports made by hand: who comes first, who has no rank, and why."""

from __future__ import annotations

from fractions import Fraction

import pytest
from case_reports import GB, analysis, case, collective, emulated, memory, refused, report

from shardlab.case_report import CaseReport
from shardlab.compare import Dominant, comparison_json, dominant, rank


def names(reports: tuple[CaseReport, ...]) -> list[str]:
    return [one.case.plan.name for one in reports]


def test_shorter_communication_time_ranks_first() -> None:
    comparison = rank([report("slow", 0.9), report("fast", 0.1), report("middle", 0.5)])
    assert names(comparison.ranked) == ["fast", "middle", "slow"]


def test_a_plan_that_does_not_fit_ranks_behind_every_plan_that_does() -> None:
    too_big = report("too-big", 0.1, memory=memory(peak_gb=90))
    unknown = report("unknown", 0.2, memory=None)
    comparison = rank([too_big, unknown, report("fits", 0.9)])
    assert names(comparison.ranked) == ["fits", "unknown", "too-big"]


def test_equal_times_are_ordered_by_bytes_then_name() -> None:
    more = report("a-more", 0.5, analysis=analysis(collective(executions=(3, 3))))
    comparison = rank([more, report("c", 0.5), report("b", 0.5)])
    assert names(comparison.ranked) == ["b", "c", "a-more"]


def test_emulated_rows_are_apart_and_ordered_by_bytes() -> None:
    comparison = rank([emulated("big", 9), report("real", 5.0), emulated("small", 1)])
    assert names(comparison.ranked) == ["real"]
    assert names(comparison.emulated) == ["small", "big"]


def test_an_emulated_row_with_a_time_is_still_not_ranked() -> None:
    timed = report("timed", 0.001, emulated=True)
    assert names(rank([timed, report("real", 1.0)]).ranked) == ["real"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        pytest.param(
            CaseReport(case=case(), infeasible="6 heads over 4 devices; 2 or 3 would do"),
            "infeasible: 6 heads over 4 devices; 2 or 3 would do",
            id="infeasible",
        ),
        pytest.param(
            CaseReport(case=case(), failure="target tpu: no libtpu"), "target tpu: no libtpu", id="failure"
        ),
        pytest.param(
            refused("v5e", 33, 16, 64),
            "does not fit: needs 33 GB of 16 GB, 17 GB too much; largest batch that compiles: 64",
            id="refused",
        ),
        pytest.param(
            refused("v5e", 33, 16, None),
            "does not fit: needs 33 GB of 16 GB, 17 GB too much; no smaller batch that compiles is known",
            id="refused-at-every-batch",
        ),
        pytest.param(
            report("new", None),
            "communication time unknown: no bandwidth known for every link of h100:1x8",
            id="unknown-time",
        ),
        pytest.param(CaseReport(case=case()), "not analysed", id="not-analysed"),
    ],
)
def test_a_row_without_a_rank_says_why(row: CaseReport, reason: str) -> None:
    comparison = rank([row, report("fine", 1.0)])
    assert names(comparison.ranked) == ["fine"]
    assert [(one.report, one.reason) for one in comparison.unranked] == [(row, reason)]


def test_cases_of_different_batches_are_not_compared() -> None:
    other = report("other", case=case("other").model_copy(update={"batch": 16}))
    with pytest.raises(ValueError, match="one model, batch, sequence and workload"):
        rank([report(), other])


def test_dominant_counts_time_over_executions() -> None:
    gather = collective(executions=(2, 2), time_s=0.05)  # 0.10 s
    reduce = collective("r", kind="all-reduce", axes=("tensor",), executions=(10, 10), time_s=0.03)  # 0.3 s
    assert dominant([gather, reduce]) == Dominant(
        kind="all-reduce", axes=("tensor",), share=pytest.approx(0.75), of="time"
    )


def test_dominant_falls_back_to_bytes_when_one_time_is_unknown() -> None:
    gather = collective(executions=(1, 1), wire_bytes=Fraction(3 * GB))
    untimed = collective(
        "r", kind="all-reduce", executions=(0, None), wire_bytes=Fraction(9 * GB), time_s=None
    )
    assert dominant([gather, untimed]) == Dominant(kind="all-gather", axes=("fsdp",), share=1.0, of="bytes")


def test_dominant_takes_the_upper_end_of_the_executions() -> None:
    often = collective(executions=(0, 4), time_s=0.1)  # at most 4 · 0.1 s
    once = collective("r", kind="all-reduce", executions=(1, 1), time_s=0.1)
    found = dominant([often, once])
    assert found is not None
    assert (found.kind, found.share) == ("all-gather", pytest.approx(0.8))


def test_nothing_dominates_when_nothing_moves() -> None:
    assert dominant([]) is None
    assert dominant([collective(axes=(), wire_bytes=Fraction(0), tier_s={}, time_s=0.0)]) is None


def test_json_is_best_first_and_emulated_rows_are_ranked_among_themselves() -> None:
    infeasible = CaseReport(case=case("odd"), infeasible="12 heads over 8 devices")
    rows = [emulated("emulated", 1), infeasible, report("slow", 2.0), report("fast", 1.0)]
    document = comparison_json(rank(rows, notes=["batch 8"]))
    keys = ("rank", "ranking", "unranked")
    found = [(row["case"]["plan"], *(row.get(key) for key in keys)) for row in document["reports"]]
    assert found == [
        ("fast", 1, "real", None),
        ("slow", 2, "real", None),
        ("emulated", 1, "emulated", None),
        ("odd", None, None, "infeasible: 12 heads over 8 devices"),
    ]
    assert document["notes"] == ["batch 8"]
