"""The file: one, self-contained, escaped; and what happens where it cannot be written."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import pytest
from case_reports import infeasible_report, refused, report
from command_line import HLO, mistakes, run, written
from report_attacks import ATTACKS, SHOWN_CONTROL, hostile
from saved_plans import LLAMA_70B, llama_70b

from shardlab.case_report import CaseReport
from shardlab.compare import rank
from shardlab.report.html import write
from shardlab.report.html.case import analysis_report, case_report
from shardlab.report.html.charts import NARROW, Segment, Span, bars, lanes
from shardlab.report.html.comparison import comparison_report
from shardlab.report.html.draw import svg_of
from shardlab.report.html.parts import Report
from shardlab.report.html.review import change_report, diff_report
from shardlab.report.html.write import html_of
from shardlab.review import diff
from shardlab.review.change import Change, PlanDiff


class Elements(HTMLParser):
    """The elements and attributes of a page, as a browser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs


@pytest.mark.parametrize("text", [*ATTACKS, SHOWN_CONTROL], ids=range(len(ATTACKS) + 1))
def test_names_make_no_element_and_no_attribute(text: str) -> None:
    """Exactly the elements that harmless names make; text of a report is never markup."""
    plain, tried = (
        Elements(html_of(case_report(hostile("name")))),
        Elements(html_of(case_report(hostile(text)))),
    )
    assert tried.tags == plain.tags
    assert tried.tags["script"] == 1
    assert {name for name, _ in tried.attributes} == {name for name, _ in plain.attributes}
    assert not [name for name, _ in tried.attributes if name.startswith("on")]


@pytest.mark.parametrize("kind", ["analysis", "comparison", "diff", "change"])
def test_names_make_no_element_in_the_other_reports(kind: str) -> None:
    """All attacks in one name."""

    def made(text: str) -> Report:
        tried, plain = hostile(text), report()
        assert tried.analysis is not None and plain.analysis is not None
        if kind == "analysis":
            return analysis_report(tried.analysis, tried.findings)
        if kind == "comparison":
            return comparison_report(rank([tried, plain], (text,)))
        found = replace(diff(plain.analysis, tried.analysis), notes=(text,))
        if kind == "diff":
            return diff_report(found)
        diffs = (PlanDiff(plan=text, machine=text, found=found),)
        return change_report(Change(base=text, head=text, diffs=diffs, limits=(text,), notes=(text,)))

    plain, tried = (Elements(html_of(made(text))) for text in ("name", f"name {' '.join(ATTACKS)}"))
    drawn = {"line", "text", "g", "path", "rect"}  # a longer name leaves an axis room for fewer ticks
    assert {tag: count for tag, count in tried.tags.items() if tag not in drawn} == {
        tag: count for tag, count in plain.tags.items() if tag not in drawn
    }
    assert {name for name, _ in tried.attributes} == {name for name, _ in plain.attributes}


def test_control_and_bidirectional_characters_are_spelled_out() -> None:
    text = html_of(case_report(hostile(SHOWN_CONTROL)))
    assert "\\x1b[31m\\u202eevil\\u2066\\x00" in text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u200e\u200f\u202a-\u202e\u2066-\u2069]", text)


@pytest.mark.parametrize("text", ATTACKS, ids=range(len(ATTACKS)))
def test_drawings_are_well_formed_and_only_drawings(text: str) -> None:
    for spec in (
        bars([Segment(text, text, 1.0, text)], {text: "red"}, NARROW, totals={text: text}),
        lanes([Span(text, text, 0.0, 1.0, text)], {text: "red"}, NARROW, 1.0),
    ):
        tags = {element.tag.split("}")[1] for element in ElementTree.fromstring(svg_of(spec)).iter()}
        assert tags <= {"svg", "g", "rect", "path", "line", "text", "tspan", "defs", "clipPath"}


def test_a_page_loads_nothing_and_runs_only_its_own_script() -> None:
    text = html_of(case_report(llama_70b()))
    elements = Elements(text)
    assert not {"link", "img", "iframe", "object", "embed", "base", "foreignobject"} & set(elements.tags)
    links = [value for name, value in elements.attributes if name in ("src", "href", "xlink:href", "srcset")]
    assert links == ["#main"]
    assert not re.search(r"url\(|@import", text)
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in text
    assert len(text.encode()) < 3_000_000


def test_ids_are_unique_and_every_reference_has_its_target() -> None:
    attributes = Elements(html_of(case_report(llama_70b()))).attributes
    ids = Counter(value for name, value in attributes if name == "id")
    assert max(ids.values()) == 1
    wanted = {value for name, value in attributes if name in ("aria-controls", "aria-labelledby")}
    assert wanted <= set(ids)


def test_every_collective_is_in_the_page() -> None:
    found = llama_70b().analysis
    assert found is not None
    text = html_of(analysis_report(found, findings=None))
    assert all(f"<code>{row.name}</code>" in text for row in found.collectives)
    assert text.count("<tr data-k0=") == len(found.collectives)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (infeasible_report("6 heads over 4 devices"), "infeasible: 6 heads over 4 devices"),
        (refused("big", 33, 16, 64), "needs 33 GB of 16 GB, 17 GB too much; largest batch that compiles: 64"),
        (report(failure="the compiler crashed", analysis=None), "the compiler crashed"),
    ],
    ids=["infeasible", "refused", "failed"],
)
def test_a_case_without_an_analysis_says_why(made: CaseReport, said: str) -> None:
    text = html_of(case_report(made))
    assert said in text
    assert Elements(text).tags["table"] == 0


def test_a_step_that_is_not_known_is_not_drawn() -> None:
    text = html_of(case_report(report(emulated=True)))
    assert "There is no predicted step of emulated devices." in text
    assert "What a step waits for" not in text


def test_analyze_writes_the_file_beside_its_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.html"
    source = written(tmp_path / "m.hlo", HLO)
    assert run("analyze", source, "--axes", "data=2", "--json", "--html", str(out)) == 0
    assert json.loads(capsys.readouterr().out)["totals"]["wire_bytes"] == [16, 16]
    text = out.read_text(encoding="utf-8")
    assert "16 B" in text and "Nothing found that could be saved." in text


def test_a_saved_program_shows_its_machine(tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    assert run("analyze", str(LLAMA_70B), "--on", "h100:64x8", "--html", str(out)) == 0
    assert "Which links are hot" in out.read_text(encoding="utf-8")


INPUTS = {"analyze": 1, "explain": 1, "compare": 1, "diff": 2}


@pytest.mark.parametrize("verb", INPUTS)
@pytest.mark.parametrize("missing", ["jinja2", "vl_convert"])
def test_without_the_extra_a_command_says_what_to_install(
    verb: str,
    missing: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Before anything is read or compiled: the input does not even exist."""
    monkeypatch.setattr(write, "find_spec", lambda name: None if name == missing else find_spec(name))
    (line,) = mistakes(
        capsys, verb, *[str(tmp_path / "none")] * INPUTS[verb], "--html", str(tmp_path / "x.html")
    )
    package = {"jinja2": "jinja2", "vl_convert": "vl-convert-python"}[missing]
    assert line == f"--html: {package} is not installed; pip install 'shardlab[report]'"


@pytest.mark.parametrize("verb", INPUTS)
def test_a_place_that_cannot_be_written_is_said_first(
    verb: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = str(tmp_path / "no" / "x.html")
    (line,) = mistakes(capsys, verb, *[str(tmp_path / "none")] * INPUTS[verb], "--html", path)
    assert line == f"{path}: cannot be written; give a file in a directory that exists"
