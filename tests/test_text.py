"""Notebook cells: figures of the record, names as they are."""

from __future__ import annotations

from fractions import Fraction
from html.parser import HTMLParser

import pytest
from case_reports import GB, analysis, collective
from report_attacks import ATTACKS, SHOWN_CONTROL
from review.analyses import made_of

from shardlab.analysis import CollectiveRow
from shardlab.review import diff


class Cells(HTMLParser):
    """The tags of a fragment, and the text of each table row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.rows: list[list[str]] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.rows += [[]] if tag == "tr" else []
        self.inside = tag in ("td", "th")
        if self.inside:
            self.rows[-1].append("")
        assert all(name in ("style", "scope") for name, _ in attrs)

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data


def html(value: object) -> str:
    return value._repr_html_()  # type: ignore[attr-defined,no-any-return]


def rows_of(count: int) -> list[CollectiveRow]:
    """Gathers of 1, 2, 3, … GB, one per layer."""
    sizes = [Fraction(GB * (number + 1)) for number in range(count)]
    return [
        collective(f"{n}", layer=f"l{n}", executions=(1, 1), wire_bytes=size) for n, size in enumerate(sizes)
    ]


def test_an_analysis_shows_its_axes_and_its_largest_collectives() -> None:
    """10 collectives of 1 to 10 GB: eight shown, 55 GB in all."""
    text = html(analysis(*rows_of(10)))
    rows = Cells(text).rows
    assert "each device sends 55 GB per step" in text and "; 2 more" in text
    assert rows[1][0] == "fsdp" and rows[1][-1] == "55 GB"
    assert [row[-1] for row in rows[3:]] == [f"{n} GB" for n in range(10, 2, -1)]


def test_a_diff_shows_its_verdict_and_its_largest_changes() -> None:
    """Two gathers of 2 and 3 GB come on top of one of 1 GB."""
    text = html(diff(made_of(rows_of(1)), made_of(rows_of(3))))
    rows = Cells(text).rows
    assert "Worse: bytes sent +5 GB (+500 %)" in text
    assert ["bytes sent", "1 GB", "6 GB", "+5 GB (+500 %)"] in rows
    assert [row[-1] for row in rows if row[0] == "added"] == ["+3 GB", "+2 GB"]


@pytest.mark.parametrize("text", [*ATTACKS, SHOWN_CONTROL], ids=range(len(ATTACKS) + 1))
def test_names_stay_text(text: str) -> None:
    row = collective(text, axes=(text,), layer=text, source=text, kind=text, phase="forward")
    allowed = {"div", "p", "strong", "br", "table", "caption", "thead", "tbody", "tr", "th", "td"}
    for value in (analysis(row), diff(analysis(collective()), analysis(row))):
        assert Cells(html(value)).tags <= allowed
        assert "\x1b" not in html(value) and "\u202e" not in html(value)
