"""Where targets of one plan agree, by hand: widening, all-reduce for reduce-scatter, permutes for gathers."""

from __future__ import annotations

import io
from dataclasses import replace
from fractions import Fraction

import pytest
from case_reports import analysis, case, collective, report

from shardlab.agreement import Agreement, AgreementRow, agreement
from shardlab.analysis import CollectiveRow, ModuleFacts
from shardlab.case_report import CaseReport
from shardlab.compare import comparison_json, rank
from shardlab.report.comparison import comparison_page
from shardlab.report.markdown import to_markdown
from shardlab.report.terminal import print_page

MACHINES = {"cpu": "cpu:8", "gpu": "h100:1x8", "tpu": "v5e:4x2"}


def on(backend: str, *rows: CollectiveRow, plan: str = "fsdp8") -> CaseReport:
    """The plan on a target of this backend, with these collectives."""
    facts = ModuleFacts(name="jit_step", backend=backend, num_devices=8, scheduled=True)
    found = replace(analysis(*rows), modules=(facts,))
    return report(plan, case=case(plan, MACHINES[backend]), analysis=found, emulated=backend == "cpu")


def sends(kind: str, wire_bytes: int, **changes: object) -> CollectiveRow:
    """One collective over fsdp, twice a step."""
    return collective(kind, kind=kind, wire_bytes=Fraction(wire_bytes), **changes)


def only(*reports: CaseReport) -> AgreementRow:
    """The one row of what these targets send."""
    (row,) = of(*reports).rows
    return row


def of(*reports: CaseReport) -> Agreement:
    found = agreement(reports)
    assert found is not None
    return found


def test_equal_bytes_agree() -> None:
    row = only(on("gpu", sends("all-gather", 700)), on("tpu", sends("all-gather", 700)))
    assert (row.kind, row.axes, row.agree, row.why) == ("all-gather", "fsdp", True, ())
    assert row.wire_bytes == ((1400, 1400), (1400, 1400))


def test_two_halves_agree_with_a_whole() -> None:
    halves = (sends("all-gather", 350), sends("all-gather", 350))
    assert only(on("gpu", *halves), on("tpu", sends("all-gather", 700))).agree


@pytest.mark.parametrize(("there", "as_on"), [(700, ", as on h100:1x8"), (701, "")], ids=["same", "other"])
def test_wider_types_are_told_and_proved(there: int, as_on: str) -> None:
    """What is left open is said to be."""
    wide = sends("all-gather", 1400, logical_payload_bytes=800, logical_wire_bytes=Fraction(700))
    row = only(on("cpu", wide), on("gpu", sends("all-gather", there)))
    assert not row.agree
    rest = () if as_on else ("the rest is not known",)
    assert row.why == (f"cpu:8: in wider types than the source's, where it is 1.4 kB{as_on}", *rest)


@pytest.mark.parametrize(
    ("reduced", "wanted"),
    [
        (1400 + 30, "cpu:8: all-reduces what h100:1x8 reduce-scatters"),
        (1400 + 31, "cpu:8: no reduce-scatter over fsdp"),
    ],
    ids=["proved", "does-not-add-up"],
)
def test_an_all_reduce_for_a_reduce_scatter(reduced: int, wanted: str) -> None:
    """Reduce-scatter of S sends (n-1)/n · S = 700, all-reduce twice that; both also all-reduce 30 bytes."""
    found = of(
        on("cpu", sends("all-reduce", reduced)),
        on("gpu", sends("reduce-scatter", 700), sends("all-reduce", 30)),
    )
    why = {row.kind: row.why for row in found.rows}
    proved = reduced == 1430
    assert why["reduce-scatter"] == ((wanted,) if proved else (wanted, "the rest is not known"))
    assert why["all-reduce"] == ((wanted,) if proved else ("not known",))
    assert found.rows[1].wire_bytes == ((0, 0), (1400, 1400))


def test_widening_and_all_reduce_at_once() -> None:
    """In f32 2 · 1400 for a bf16 reduce-scatter of 700: the source's types are compared."""
    wide = sends("all-reduce", 2800, logical_payload_bytes=800, logical_wire_bytes=Fraction(1400))
    found = of(on("cpu", wide), on("gpu", sends("reduce-scatter", 700)))
    assert all("cpu:8: all-reduces what h100:1x8 reduce-scatters" in row.why for row in found.rows)


def test_permutes_that_realize_a_gather_stand_in_its_row() -> None:
    permutes = sends("collective-permute", 100, executions=(7, 7), realizes="all-gather")
    row = only(on("tpu", permutes), on("gpu", sends("all-gather", 700, executions=(1, 1))))
    assert (row.kind, row.agree) == ("all-gather", True)
    more = replace(permutes, executions=(8, 8))
    row = only(on("tpu", more), on("gpu", sends("all-gather", 700, executions=(1, 1))))
    assert row.why == ("v5e:4x2: carried out by collective-permutes", "the rest is not known")


def test_what_is_not_exact_never_agrees() -> None:
    unknown = sends("all-gather", 700, executions=(1, None))
    row = only(on("gpu", unknown), on("tpu", unknown))
    assert not row.agree
    assert row.wire_bytes == ((700, None), (700, None))
    assert all("not exact" in why for why in row.why)


def test_what_moves_nothing_has_no_row() -> None:
    still = sends("all-reduce", 0, axes=())
    assert of(on("gpu", still), on("tpu", still)).rows == ()


@pytest.mark.parametrize(
    "reports",
    [
        (on("gpu"),),
        (on("gpu"), on("gpu")),
        (on("gpu"), on("tpu", plan="other")),
        (on("gpu"), replace(on("tpu"), analysis=None)),
        (),
    ],
    ids=["one", "one-backend", "two-plans", "one-analysed", "none"],
)
def test_no_agreement_without_one_plan_on_two_backends(reports: tuple[CaseReport, ...]) -> None:
    assert agreement(reports) is None


def test_the_comparison_shows_it_everywhere() -> None:
    wide = sends("all-gather", 1400, logical_payload_bytes=800, logical_wire_bytes=Fraction(700))
    compared = rank([on("cpu", wide), on("gpu", sends("all-gather", 700))])
    assert comparison_json(compared)["agreement"] == {
        "targets": ["cpu:8", "h100:1x8"],
        "rows": [
            {
                "kind": "all-gather",
                "axes": "fsdp",
                "wire_bytes": {"cpu:8": [2800, 2800], "h100:1x8": [1400, 1400]},
                "agree": False,
                "why": ["cpu:8: in wider types than the source's, where it is 1.4 kB, as on h100:1x8"],
            }
        ],
    }
    page = comparison_page(compared)
    stream = io.StringIO()
    print_page(page, stream, width=150)
    for text in (stream.getvalue(), to_markdown(page)):
        assert "Where targets agree" in text
        assert "2.8 kB" in text
    assert "agreement" not in comparison_json(rank([on("gpu")]))
    assert "Where targets agree" not in to_markdown(comparison_page(rank([on("gpu")])))
