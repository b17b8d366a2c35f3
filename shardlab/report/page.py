"""What every report writer gets: a page of facts, tables and notes, as plain text with a mood. No writer
adds words.

Text may come from a dump that somebody else made, so it is data to every writer: escaped, never markup.
Control characters (a terminal would obey them) are shown as `\\x1b`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from shardlab.text import visible as visible

Mood = Literal["", "good", "warn", "bad", "dim", "strong"]


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a cell. `code`: a name from the program (shown verbatim)."""

    text: str
    mood: Mood = ""
    code: bool = False


Cell = tuple[Line, ...]


@dataclass(frozen=True, slots=True)
class Column:
    """A column's header and alignment. keep: never wrapped."""

    header: str
    align: Literal["left", "right"] = "left"
    keep: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of cells under a title; `caption` says what was left out, or how to read the figures.

    folded: a writer that can fold shows the title alone until it is asked for.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""
    folded: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """One report: title, facts (label, value), tables, notes."""

    title: str
    facts: tuple[tuple[str, str], ...] = ()
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()


def cell(text: str, mood: Mood = "") -> Cell:
    """A cell of one line."""
    return (Line(text, mood),)


def code(text: str) -> Cell:
    """A cell of one name from the program; empty when there is none."""
    return (Line(text, code=True),) if text else ()


def lines(texts: Iterable[str], mood: Mood = "") -> Cell:
    """A cell of one line per text."""
    return tuple(Line(text, mood) for text in texts)
