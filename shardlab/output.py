"""Where answers go: standard output, and the files that flags name."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from shardlab.errors import Problem, ShardlabError, UserError

if TYPE_CHECKING:
    from shardlab.case_report import CaseReport
    from shardlab.program import Program
    from shardlab.report.html.parts import Report
    from shardlab.report.page import Page


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
