"""A page on a terminal, by rich. Colour only where the stream is a terminal; text is never read as markup."""

from __future__ import annotations

import os
from typing import TextIO

from rich import box
from rich.console import Console, Group
from rich.table import Table as RichTable
from rich.text import Text

from shardlab.report.page import Cell, Column, Page, Table, visible

STYLES = {"": "", "good": "green", "warn": "yellow", "bad": "red", "dim": "dim", "strong": "bold"}
# A pipe or a file has no width: wide enough for every table, narrow enough to read in a log.
PIPE_COLUMNS = 120


def print_page(page: Page, stream: TextIO, width: int | None = None) -> None:
    """Write the page to the stream. `width` in columns: by default the terminal's, `COLUMNS`, or 120."""
    console = console_on(stream, width)
    console.print(Text(visible(page.title), style="bold"))
    for label, value in page.facts:
        console.print(_labelled(label, value))
    for table in page.tables:
        console.print()
        console.print(_table(table))
    if page.notes:
        console.print()
    for note in page.notes:
        console.print(_labelled("note", note, width=4))


def console_on(stream: TextIO, width: int | None = None) -> Console:
    """A console that neither guesses at highlights nor reads markup or emoji codes."""
    if width is None and not stream.isatty():
        width = int(os.environ.get("COLUMNS", "0") or 0) if os.environ.get("COLUMNS", "").isdigit() else 0
        width = width or PIPE_COLUMNS
    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False, soft_wrap=False)


def _labelled(label: str, value: str, width: int = 12) -> RichTable:
    """A label, and text that wraps beside it, not under it."""
    grid = RichTable.grid(padding=(0, 1))
    grid.add_column(width=width, style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(Text(visible(label)), Text(visible(value)))
    return grid


def _table(table: Table) -> Group:
    tall = any(len(value) > 1 for row in table.rows for value in row)
    grid = RichTable(
        box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", show_edge=False, leading=1 if tall else 0
    )
    for column in table.columns:
        _add_column(grid, column)
    for row in table.rows:
        grid.add_row(*(_text(value) for value in row))
    parts: list[Text | RichTable] = [Text(visible(table.title), style="bold underline"), grid]
    if table.caption:
        parts.append(Text(visible(table.caption), style="dim"))
    return Group(*parts)


def _add_column(grid: RichTable, column: Column) -> None:
    grid.add_column(
        Text(visible(column.header)),
        justify=column.align,
        no_wrap=column.keep,
        overflow="fold",
        vertical="top",
    )


def _text(value: Cell) -> Text:
    text = Text(overflow="fold")
    for number, line in enumerate(value):
        text.append("\n" if number else "")
        text.append(visible(line.text), style=STYLES[line.mood])
    return text
