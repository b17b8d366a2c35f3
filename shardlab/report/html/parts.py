"""What an HTML report consists of: tabs of blocks. Plain values and plain text; the templates add markup.

A block is a `Chart`, a `Table` of `report.page`, a `Heat`, a `Listing`, a `Prose` or `Facts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from shardlab.report.page import Cell, Mood, Table

Spec = Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A headline figure. mood: of `detail`, whose words say the same."""

    label: str
    value: str
    detail: str = ""
    mood: Mood = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A drawing. wide, narrow: Vega-Lite specifications for a desk and for a phone (`wide` there too where it
    is None). alt: what it shows, for who cannot see it. legend: series -> colour, a variable of the page.
    table: the figures that it draws, to unfold."""

    title: str
    alt: str
    wide: Spec
    narrow: Spec | None = None
    legend: Mapping[str, str] = field(default_factory=dict)
    caption: str = ""
    table: Table | None = None


@dataclass(frozen=True, slots=True)
class Warm:
    """A figure of a heat map, and how warm its cell is: 0 to 1 of the warmest."""

    text: str
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Heat:
    """A table whose cells are coloured by size. groups: (title, columns below it); the first column is of
    sums. rows: a label and a cell per column, None where nothing is."""

    title: str
    header: str
    groups: tuple[tuple[str, tuple[str, ...]], ...]
    rows: tuple[tuple[str, tuple[Warm | None, ...]], ...]
    caption: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A row of a listing. keys: by what each filter selects it. order: by what a column of figures sorts it;
    other columns are sorted by their text."""

    cells: tuple[Cell, ...]
    order: tuple[float | None, ...]
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """A table that can be sorted and filtered. columns: (header, whether its cells are figures); filters:
    labels of `Item.keys`. One per report: `name` is part of the ids in the page."""

    title: str
    name: str
    columns: tuple[tuple[str, bool], ...]
    filters: tuple[str, ...]
    items: tuple[Item, ...]
    caption: str = ""

    def choices(self, number: int) -> tuple[str, ...]:
        """What a filter can be set to, in order."""
        return tuple(sorted({item.keys[number] for item in self.items}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Prose:
    """Sentences under a title, one per line; `title` empty for none."""

    title: str
    lines: tuple[str, ...]
    mood: Mood = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """Labels and values."""

    rows: tuple[tuple[str, str], ...]


Block = Chart | Table | Heat | Listing | Prose | Facts


@dataclass(frozen=True, slots=True, kw_only=True)
class Tab:
    """A part of the report that is shown by itself. count: of what is in it, beside its title."""

    name: str
    title: str
    blocks: tuple[Block, ...]
    count: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One file. verdict: the answer in a sentence. made_by: versions and flags, at its foot."""

    title: str
    subtitle: str
    verdict: str
    mood: Mood
    cards: tuple[Card, ...]
    tabs: tuple[Tab, ...]
    made_by: str = ""
