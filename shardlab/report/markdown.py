"""A page as GitHub-flavoured Markdown. Everything that is not ours is escaped or put in a code span."""

from __future__ import annotations

import re

from shardlab.report.page import Cell, Column, Line, Page, Table, visible

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#|~!&$])")
_MENTION = re.compile(r"@(?=\w)")


def to_markdown(page: Page) -> str:
    """The page as Markdown text, ending in one newline."""
    blocks = [f"## {plain(page.title)}"]
    if page.facts:
        blocks.append("\n".join(f"- **{plain(label)}**: {plain(value)}" for label, value in page.facts))
    blocks += [_table(table) for table in page.tables]
    if page.notes:
        blocks.append("\n".join(f"- {plain(note)}" for note in page.notes))
    return "\n\n".join(blocks) + "\n"


def plain(text: str) -> str:
    """Text that Markdown shows as it is and that mentions nobody."""
    return _MENTION.sub("@<!-- -->", _SPECIAL.sub(r"\\\1", visible(text)))


def code_span(text: str) -> str:
    """A code span for a table cell: a fence longer than any run of backticks inside, `|` escaped."""
    shown = visible(text).replace("|", "\\|")
    runs = [len(run) for run in re.findall(r"`+", shown)]
    fence = "`" * (max(runs, default=0) + 1)
    pad = " " if runs else ""
    return f"{fence}{pad}{shown}{pad}{fence}"


def _table(table: Table) -> str:
    head = "| " + " | ".join(plain(column.header) for column in table.columns) + " |"
    rule = "|" + "|".join(_rule(column) for column in table.columns) + "|"
    rows = ["| " + " | ".join(_cell(value) for value in row) + " |" for row in table.rows]
    parts = ["\n".join([head, rule, *rows]), *([plain(table.caption)] if table.caption else [])]
    if table.folded:  # GitHub wants an empty line on either side of what is folded
        return "\n\n".join([f"<details><summary>{plain(table.title)}</summary>", *parts, "</details>"])
    return "\n\n".join([f"### {plain(table.title)}", *parts])


def _rule(column: Column) -> str:
    return " ---: " if column.align == "right" else " --- "


def _cell(value: Cell) -> str:
    return "<br>".join(_line(line) for line in value)


def _line(line: Line) -> str:
    text = code_span(line.text) if line.code else plain(line.text)
    return f"**{text}**" if line.mood == "strong" and text and not line.code else text
