"""Where answers go: standard output, and the files that flags name."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shardlab.errors import Problem, ShardlabError, UserError

if TYPE_CHECKING:
    from shardlab.analysis import Analysis
    from shardlab.audit import Finding
    from shardlab.case_report import CaseReport
    from shardlab.order import Orders
    from shardlab.program import Program
    from shardlab.report.html.parts import Report
    from shardlab.report.page import Page
    from shardlab.why import Why


def check_writable(path: str) -> None:
    """Before a long compile, not after it."""
    target = Path(path)
    if target.is_dir() or not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
        raise UserError(Problem(path, "cannot be written", "give a file in a directory that exists"))


def check_html(path: str | None) -> None:
    """That the file can be written, and that what writes it is installed."""
    if path is None:
        return
    from shardlab.report.html.write import check_tools

    check_writable(path)
    check_tools()


def write_html(report: Report, path: str) -> None:
    """Write a report for the browser."""
    from shardlab.report.html.write import html_of

    write_text(path, html_of(report))


def write_text(path: str, text: str) -> None:
    """Write a file whole or not at all. Raises UserError when it cannot be written."""
    from shardlab.program import write_atomically

    try:
        write_atomically(Path(path), text.encode())
    except OSError as error:
        raise UserError(Problem(path, error.strerror or str(error), "give another file")) from None


def write_program(program: Program | None, hlo: str | None, saved: str | None) -> None:
    """Write the HLO text, the whole program, or both; says where there is none."""
    from shardlab.program import save, write_atomically

    if program is None or program.refusal is not None:
        for path in filter(None, (hlo, saved)):
            print(f"{path}: not written, there is no compiled program", file=sys.stderr)
        return
    try:
        if hlo:
            write_atomically(Path(hlo), program.hlo_text.encode())
        if saved:
            save(program, saved)
    except OSError as error:
        raise UserError(
            Problem(hlo or saved or "", error.strerror or str(error), "give another file")
        ) from None


def write_trace(report: CaseReport, path: str) -> None:
    """Write the predicted step as a Chrome trace; says where there is none."""
    from shardlab.report.trace import chrome_trace

    if report.predicted is None or report.step_time_s is None:
        print(f"{path}: not written, there is no step time", file=sys.stderr)
        return
    name = f"{report.case.plan.name} on {report.case.machine}"
    write_text(path, json.dumps(chrome_trace(report.predicted.timeline, name), allow_nan=False))


def print_json(document: object) -> None:
    """One document on standard output."""
    json.dump(document, sys.stdout, indent=2, allow_nan=False)
    sys.stdout.write("\n")


def print_page(page: Page, markdown: bool) -> None:
    """A page on standard output, for a terminal or as Markdown."""
    if markdown:
        from shardlab.report.markdown import to_markdown

        sys.stdout.write(to_markdown(page))
        return
    from shardlab.report.terminal import print_page

    print_page(page, sys.stdout)


def columns() -> int:
    """Of the terminal, or what a pipe gets."""
    from shardlab.report.terminal import console_on

    return console_on(sys.stdout).width


def one_line_each(error: ShardlabError) -> str:
    """One line per mistake: newlines inside a problem would look like more of them, and a terminal would obey
    control characters of a name."""
    from shardlab.report.page import visible

    mistakes = error.problems if isinstance(error, UserError) else (error,)
    return "\n".join(visible(" ".join(str(mistake).split())) for mistake in mistakes)


def print_analysis(
    args: argparse.Namespace,
    analysis: Analysis,
    findings: Sequence[Finding] | None,
    orders: Orders | None,
    reasons: Sequence[Why] | None,
) -> None:
    """What was asked for beside the analysis goes with it; what was not is not even imported."""
    if args.json:
        document = analysis.to_json()
        if findings is not None:
            from shardlab.audit import finding_json

            document |= {"audit": [finding_json(one) for one in findings]}
        if orders is not None:
            from shardlab.order import orders_member

            document |= orders_member(orders)
        if reasons is not None:
            from shardlab.why import why_json

            document |= why_json(reasons)
        print_json(document)
        return
    if reasons is not None:
        print_reasons(reasons, args.markdown)
        return
    from shardlab.report.breakdown import analysis_page

    page = analysis_page(analysis, findings=findings)
    if orders is not None:
        from shardlab.report.order import with_orders

        page = with_orders(page, orders)
    print_page(page, args.markdown)


def print_reasons(reasons: Sequence[Why], markdown: bool) -> None:
    """Only these: who asks why does not ask for the whole page."""
    from shardlab.report.why import why_pages

    for page in why_pages(reasons):
        print_page(page, markdown)
