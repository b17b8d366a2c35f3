"""The page of `compare`, from reports made by hand."""

from __future__ import annotations

import io
from dataclasses import replace
from fractions import Fraction

import pytest
from case_reports import analysis, case, collective, emulated, memory, refused, report

from shardlab.analysis import LedgerEntry
from shardlab.case_report import EMULATED_NOTE, CaseReport
from shardlab.compare import rank
from shardlab.report.comparison import comparison_page
from shardlab.report.markdown import to_markdown
from shardlab.report.page import Table
from shardlab.report.terminal import print_page


def texts(table: Table) -> list[list[str]]:
    return [["\n".join(line.text for line in value) for value in row] for row in table.rows]


def test_a_ranked_row_holds_every_figure() -> None:
    page = comparison_page(rank([report("fsdp8", 0.5)]))
    (row,) = texts(page.tables[0])
    assert row[0] == "1"
    assert row[1].startswith("fsdp8\n")
    assert row[2:] == [
        "60 GB of 80 GB\nfits",
        "500 ms",
        "all-gather\nover fsdp\n100 % of time",
        "fsdp 14 GB",  # twice 7/8 of 8 GB
        "nvlink 14 GB 500 ms",
        "200 TFLOP",
    ]


def test_narrow_pages_say_the_same_in_two_tables() -> None:
    wide = comparison_page(rank([report()])).tables[0]
    upper, lower = comparison_page(rank([report()]), width=120).tables
    assert texts(upper)[0] + texts(lower)[0][2:] == texts(wide)[0]
    assert texts(lower)[0][1] == "fsdp8"


def test_emulated_rows_have_a_table_and_a_note_of_their_own() -> None:
    page = comparison_page(rank([emulated("cpu8-fsdp", 3), report("real")]))
    real, apart = page.tables
    assert "not ranked among real machines" in apart.title
    assert [row[1].split("\n")[0] for row in texts(real)] == ["real"]
    assert [row[1].split("\n")[:2] for row in texts(apart)] == [["cpu8-fsdp", "on cpu:8"]]
    assert page.notes == (EMULATED_NOTE,)


def test_rows_without_an_answer_say_why() -> None:
    infeasible = CaseReport(case=case("odd"), infeasible="12 heads over 8 devices; 4 would do")
    page = comparison_page(rank([infeasible, refused("big", 33, 16, 64), report()]))
    rows = {name.split("\n")[0]: why for name, why in texts(page.tables[-1])}
    assert rows == {
        "odd": "infeasible: 12 heads over 8 devices; 4 would do",
        "big": "does not fit: needs 33 GB of 16 GB, 17 GB too much; largest batch that compiles: 64",
    }


@pytest.mark.parametrize(
    ("held", "shown"),
    [
        (memory(peak_gb=90), "90 GB of 80 GB\n10 GB too much"),
        (None, "–"),
    ],
    ids=["too-much", "unknown"],
)
def test_memory_cell(held: object, shown: str) -> None:
    page = comparison_page(rank([report(memory=held)]))
    assert texts(page.tables[0])[0][2] == shown


def test_unknown_is_a_dash_and_never_a_zero() -> None:
    bare = report("bare", None, memory=None, hardware_flops=None, model_flops=None, emulated=True)
    row = texts(comparison_page(rank([bare])).tables[0])[0]
    assert (row[2], row[6]) == ("–", "–")


def test_a_plan_that_moves_nothing_says_so() -> None:
    alone = analysis(collective(axes=(), wire_bytes=Fraction(0), tier_s={}, time_s=0.0))
    page = comparison_page(rank([report(analysis=alone)]))
    assert texts(page.tables[0])[0][4:6] == ["–", "nothing"]


def test_a_note_that_all_plans_share_is_said_once() -> None:
    page = comparison_page(rank([report("a", notes=("same", "only a")), report("b", notes=("same",))]))
    assert page.notes == ("same", "a: only a")


def test_a_note_names_the_machine_or_the_plan_or_the_case_that_it_is_about() -> None:
    everywhere = [(name, machine) for name in ("a", "b") for machine in ("h100:1x8", "v5e:2x4")]
    notes = {
        ("a", "h100:1x8"): ("machine", "case"),
        ("b", "h100:1x8"): ("machine", "plan"),
        ("a", "v5e:2x4"): (),
        ("b", "v5e:2x4"): ("plan",),
    }
    rows = [report(case=case(*key), notes=notes[key]) for key in everywhere]
    assert set(comparison_page(rank(rows)).notes) == {
        "h100:1x8: machine",
        "a on h100:1x8: case",
        "b: plan",
    }


def test_a_ledger_that_is_not_empty_is_mentioned() -> None:
    entry = LedgerEntry(what="custom-call", name="x", why="opaque")
    with_ledger = report("a", analysis=replace(analysis(), ledger=(entry,)))
    page = comparison_page(rank([with_ledger]))
    assert page.notes == ("1 entry on the ledger (not counted, or not exactly): see shardlab explain",)


@pytest.mark.parametrize("width", [80, 99, 100, 120, 149, 150, 200])
def test_no_line_is_wider_than_the_terminal_and_nothing_is_cut_off(width: int) -> None:
    sent = analysis(collective(), collective("r", axes=("data", "fsdp", "tensor"), kind="reduce-scatter"))
    sent = replace(sent, totals=replace(sent.totals, traffic={"infiniband": (Fraction(10**12, 7),) * 2}))
    rows = [report(f"h100x512-fsdp64-tensor8-{n}", n, analysis=sent) for n in (1.0, 2.0)]
    page = comparison_page(rank([*rows, emulated("cpu8-data2-fsdp2-tensor2", 3)]), width)
    stream = io.StringIO()
    print_page(page, stream, width)
    printed = stream.getvalue()
    assert max(len(line) for line in printed.splitlines()) <= width
    for table in page.tables:
        for word in (word for row in texts(table) for value in row for word in value.split()):
            assert word in printed, f"{word} is cut or folded"


def test_markdown_has_a_row_per_plan() -> None:
    text = to_markdown(comparison_page(rank([report("a_b", 1.0), report("c", 2.0)])))
    assert text.count("\n| **1** | **a\\_b**<br>") == 1
    assert text.count("\n| **2** | **c**<br>") == 1
