"""The page and the comment of a diff: what they say, that they fit, and that names stay data."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from case_reports import collective, report
from review.analyses import made_of

from shardlab.analysis import Analysis, analyze
from shardlab.report.diff import COMMENT_CHARACTERS, COMMENT_ROWS, diff_comment, diff_page
from shardlab.report.terminal import print_page
from shardlab.review import diff

GOLDEN = Path(__file__).parents[1] / "golden" / "hlo"
HOSTILE = "</details><script>alert(1)</script>|@owner [x](http://y) `` \x1b[31m" + "y" * 20_000


def many(count: int, text: str = "layer", gb: int = 1) -> Analysis:
    """Gathers of 1, 2, 3, … GB, one per layer."""
    rows = [
        collective(
            f"{text}.{n}",
            layer=f"{text}/{n}",
            source=f"{text}.py:{n}",
            wire_bytes=Fraction(gb * (n + 1) * 10**9),
            payload_bytes=gb * (n + 1) * 10**9,
            executions=(1, 1),
        )
        for n in range(count)
    ]
    return made_of(rows)


def printed(base: Analysis, head: Analysis, top: int | None = None) -> str:
    stream = io.StringIO()
    print_page(diff_page(diff(base, head), top), stream, 140)
    return stream.getvalue()


def test_the_page_says_what_changed_by_how_much_and_where() -> None:
    """Three gathers of 1, 2, 3 GB become twice as large."""
    text = printed(many(3), many(3, gb=2))
    assert "Worse: bytes sent +6 GB (+100 %)" in text
    row = next(line for line in text.splitlines() if line.startswith("grew"))
    assert "all-gather over fsdp" in row and "+3 GB" in row and "layer.py:2" in row  # the largest first
    assert "3 GB → 6 GB" in text


def test_what_is_left_out_is_said_with_its_sum() -> None:
    """12 layers added of 1 to 12 GB: ten shown, 12 to 3; two left, 1 + 2 GB."""
    text = diff_comment(diff(many(0), many(12)))
    assert text.count("| added |") == COMMENT_ROWS
    assert "2 more, +3 GB together" in text
    assert "<details><summary>Bytes sent, by mesh axis</summary>\n\n|" in text


def test_rows_that_do_not_sum_to_the_totals_are_said_to() -> None:
    """A conditional counts once in the totals; its branches are rows of their own."""
    text = (GOLDEN / "d17_conditional.hlo").read_text()
    branches = analyze(text, axes={"data": 2, "model": 4})
    sent = branches.totals.wire_bytes[1]
    rows = sum(row.wire_bytes * (row.executions[1] or 0) for row in branches.collectives)
    assert sent is not None and sent < rows
    caption = "Rows count every branch of a conditional"
    assert caption in printed(branches, branches)
    assert caption not in printed(many(1), many(2))


def test_no_change_needs_no_table() -> None:
    text = printed(many(3), many(3))
    assert "No change: 3 collectives send the same 6 GB" in text
    assert "What changed" not in text


def test_a_comment_fits_and_names_stay_data() -> None:
    text = diff_comment(diff(many(0), many(400, HOSTILE)))
    assert len(text) <= COMMENT_CHARACTERS
    assert text.count("| added |") == COMMENT_ROWS
    outside_code = re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", text)
    assert outside_code.count("<details>") == outside_code.count("</details>") == 2
    assert "<script>" not in outside_code
    assert not re.search(r"@\w", outside_code)
    assert "\x1b" not in text


def test_the_worst_that_names_and_notes_can_be_still_fits() -> None:
    """Mentions grow most when they are escaped; every table and every note is full of them."""
    rows = [
        collective(
            f"{n}",
            axes=("@a" * 9_000 + str(n),),
            tier="@b" * 9_000 + str(n),
            traffic={"@c" * 9_000 + str(n): Fraction(n)},
        )
        for n in range(1, 60)
    ]
    notes = tuple("@d" * 9_000 + str(n) for n in range(60))
    base, head = report(notes=notes, analysis=made_of([])), report(analysis=made_of(rows))
    text = diff_comment(diff(base, head))
    assert len(text) <= COMMENT_CHARACTERS
    assert "50 more notes; --json has all" in text


def test_notes_that_both_reports_have_are_said_once() -> None:
    page = diff_page(diff(report(notes=("shared", "old")), report(notes=("shared", "new"))))
    assert page.notes == ("shared", "base: old", "head: new")


def test_a_side_says_what_was_compiled() -> None:
    """A step function has no model, and may have asked for no batch: what is not known is not written."""
    base, head = made_of([]), made_of([])
    found = diff(base, head)
    said = {"step": "train.step:make_step", "workload": "train", "machine": "h100:8x8", "batch": 64}
    (fact,) = (
        value
        for name, value in diff_page(replace(found, base=replace(found.base, case=said))).facts
        if name == "base"
    )
    assert fact.endswith(": train.step:make_step, train, batch 64 on h100:8x8")
