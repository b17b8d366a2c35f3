"""The page of `shardlab diff`: what a change does to a step, the verdict first; also as a GitHub comment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction

from shardlab.analysis import ByteRange, axes_key
from shardlab.report.breakdown import mesh_text
from shardlab.report.figures import NONE, axes_text, key_text, times
from shardlab.report.markdown import to_markdown
from shardlab.report.page import Cell, Column, Line, Mood, Page, Table, cell, lines, visible
from shardlab.review.records import NOTHING, Diff, Flow, Row, Side, minus, plus
from shardlab.review.verdict import Judgement, Measure, measures, verdict
from shardlab.units import UNKNOWN, format_bytes

COMMENT_CHARACTERS = 60_000  # GitHub refuses comments above 65,536
COMMENT_ROWS = 10
TERMINAL_ROWS = 25
# Characters of a name, notes, and rows of the tables of parts: names come from a program, and some are long.
# Escaping makes a text at most six times as long, so that what is not a change stays below 50,000 together.
NAME_CHARACTERS = 160
_NOTES, _PARTS = 10, 10
MOODS: dict[Judgement, Mood] = {
    "worse": "bad",
    "better": "good",
    "mixed": "warn",
    "unknown": "warn",
    "same": "",
    "added": "",
    "deleted": "",
}


def diff_page(found: Diff, top: int | None = None) -> Page:
    """Verdict, totals, what changed, by axis and tier. top: changes shown, all unless said."""
    facts = (
        ("verdict", verdict(found).text),
        ("base", _side_text(found.base)),
        ("head", _side_text(found.head)),
        *_mesh_fact(found),
    )
    alone = found.base.absent or found.head.absent  # then the verdict has all figures
    tables = () if alone else (_totals_table(found), *_change_tables(found, top), *_part_tables(found))
    notes = (*found.notes, *_side_notes(found))
    return Page(
        title="What the change does to a step",
        facts=tuple((label, clipped(text, 2 * NAME_CHARACTERS)) for label, text in facts),
        tables=tuple(table for table in tables if table.rows),
        notes=shown_notes(notes),
    )


def diff_comment(found: Diff) -> str:
    """The page as Markdown that fits a GitHub comment: the top ten changes, details folded away."""
    top = COMMENT_ROWS
    text = to_markdown(diff_page(found, top))
    while len(text) > COMMENT_CHARACTERS and top:
        top -= 1
        text = to_markdown(diff_page(found, top))
    return text


def _side_text(side: Side) -> str:
    case = side.case
    if not case:
        return f"{side.name}: {side.why_not}" if side.absent else side.name
    sizes = (("batch {}", case.get("batch")), ("sequence {}", case.get("seq")))
    asked = (case.get("step") or case.get("model"), case.get("workload"))
    what = [str(one) for one in asked if one] + [text.format(size) for text, size in sizes if size]
    return f"{side.name}: {', '.join(what)} on {case.get('machine')}"


def _mesh_fact(found: Diff) -> tuple[tuple[str, str], ...]:
    base, head = (
        side.analysis.mesh if side.analysis is not None else None for side in (found.base, found.head)
    )
    if base is None or head is None:
        return ()
    if list(base.items()) == list(head.items()):
        return (("mesh", mesh_text(head)),)
    return (("mesh", f"{mesh_text(base)} → {mesh_text(head)}"),)


def _side_notes(found: Diff) -> tuple[str, ...]:
    """What both say once; what one says, with its side."""
    base, head = found.base.notes, found.head.notes
    return (
        *(note for note in head if note in base),
        *(f"base: {note}" for note in base if note not in head),
        *(f"head: {note}" for note in head if note not in base),
    )


def _totals_table(found: Diff) -> Table:
    columns = (Column("per device and step"), *(Column(name, "right") for name in ("base", "head", "change")))
    rows = tuple(
        (
            cell(one.name),
            cell(one.text(one.before)),
            cell(one.text(one.after)),
            cell(one.change_text, _mood(one)),
        )
        for one in measures(found)
    )
    return Table(title="Totals", columns=columns, rows=rows, caption=_branches(found))


def _mood(one: Measure) -> Mood:
    return "" if not one.change else "bad" if one.change > 0 else "good"


def _branches(found: Diff) -> str:
    """Whether the rows sum to the totals; they do not where a conditional runs one branch of several."""
    if found.before is None or found.after is None:
        return ""
    for rows, whole in (
        ([row.before.wire_bytes for row in found.rows], found.before.wire_bytes),
        ([row.after.wire_bytes for row in found.rows], found.after.wire_bytes),
    ):
        if _sum(rows) != whole:
            return "Rows count every branch of a conditional and every stage; a device runs some of them."
    return ""


def _sum(values: Iterable[ByteRange]) -> ByteRange:
    together = NOTHING
    for value in values:
        together = plus(together, value)
    return together


def _change_tables(found: Diff, top: int | None) -> tuple[Table, ...]:
    changes = found.changes
    shown = changes if top is None else changes[:top]
    columns = (
        Column("change"),
        Column("collective", keep=False),
        Column("bytes sent", "right"),
        Column("phase, layer", keep=False),
        Column("source line", keep=False),
    )
    left = changes[len(shown) :]
    caption = ""
    if left:
        rest = _sum(minus_of(row) for row in left)
        caption = f"{len(left)} more, {_signed(rest)} together; --json has all."
    if not shown and left:
        return (Table(title="What changed", columns=columns, rows=((cell(caption), *[cell("")] * 4),)),)
    rows = tuple(change_cells(row) for row in shown)
    return (Table(title="What changed", columns=columns, rows=rows, caption=caption),)


def change_cells(row: Row) -> tuple[Cell, ...]:
    """What happened, to which collective, bytes sent, phase and layer, source lines."""
    return (_what(row), _collective(row), _sent(row), _place(row), _sources(row))


def minus_of(row: Row) -> ByteRange:
    """What a row changes in bytes sent."""
    return minus(row.after.wire_bytes, row.before.wire_bytes)


def _what(row: Row) -> Cell:
    mood: Mood = (
        "bad" if row.what in ("added", "grew") else "good" if row.what in ("removed", "shrank") else "warn"
    )
    moved = (f"other {', '.join(row.moved)}",) if row.moved else ()
    return lines((row.what, *moved), mood)


def _collective(row: Row) -> Cell:
    """Kind and axes, then how often and in what; both sides where they differ."""
    return lines(
        (
            _both(row, lambda flow: f"{flow.kind} over {axes_text(flow.axes)}"),
            _both(row, _details),
        )
    )


def _details(flow: Flow) -> str:
    sizes = "/".join(map(str, flow.group_sizes))
    tier = f", {'+'.join(flow.tiers)}" if flow.tiers else ""
    return f"{times(flow.executions)} {'+'.join(flow.dtypes)}, groups of {sizes}{tier}"


def _both(row: Row, text_of: object) -> str:
    texts = list(dict.fromkeys(text_of(flow) for flow in (*row.base[:1], *row.head[:1])))  # type: ignore[operator]
    return clipped(" → ".join(texts))


def _sent(row: Row) -> Cell:
    change = minus_of(row)
    if not row.base or not row.head:
        return cell(_signed(change))
    return lines(
        (_signed(change), f"{format_bytes(row.before.wire_bytes)} → {format_bytes(row.after.wire_bytes)}")
    )


def _place(row: Row) -> Cell:
    phase, layer = _both(row, lambda flow: flow.phase), _both(row, lambda flow: flow.layer or NONE)
    return (Line(phase), Line(layer, code=layer != NONE))


def _sources(row: Row) -> Cell:
    """Of what is there now; of what was there, where nothing is left."""
    flows = row.head or row.base
    found = list(dict.fromkeys(source for flow in flows for source in flow.sources))
    more = (Line(f"and {len(found) - 3} more"),) if len(found) > 3 else ()
    return (*(Line(clipped(source), code=True) for source in found[:3]), *more) or cell(NONE)


def _signed(change: ByteRange) -> str:
    """`+1.2 GB`, `−1.2 GB`, `0 B`; both ends where they differ."""
    low, high = change
    if high is None:
        return UNKNOWN
    ends = [low] if low == high else sorted((low, high))
    return " – ".join(_signed_end(end) for end in ends)


def _signed_end(value: Fraction) -> str:
    sign = "+" if value > 0 else "−" if value < 0 else ""
    return sign + format_bytes(abs(value))


def _part_tables(found: Diff) -> tuple[Table, ...]:
    """By axis and by tier, only where something changed."""
    if found.before is None or found.after is None:
        return ()
    axes: list[Mapping[str, ByteRange]] = [{}, {}]
    for row in found.rows:
        for table, flows in zip(axes, (row.base, row.head), strict=True):
            for flow in flows:
                key = axes_key(flow.axes)
                table[key] = plus(table.get(key, NOTHING), flow.amounts.wire_bytes)  # type: ignore[index]
    return (
        _parts_table("Bytes sent, by mesh axis", "axes", *axes),
        _parts_table("Traffic, by link", "link", found.before.traffic, found.after.traffic),
    )


def _parts_table(
    title: str, header: str, base: Mapping[str, ByteRange], head: Mapping[str, ByteRange]
) -> Table:
    keys = sorted({*base, *head})
    pairs = {key: (base.get(key, NOTHING), head.get(key, NOTHING)) for key in keys}
    changed = any(before != after for before, after in pairs.values())
    rows = tuple(
        (
            cell(clipped(key_text(key))),
            cell(format_bytes(before)),
            cell(format_bytes(after)),
            cell(_signed(minus(after, before))),
        )
        for key, (before, after) in pairs.items()
    )
    columns = (Column(header, keep=False), *(Column(name, "right") for name in ("base", "head", "change")))
    (caption,) = more(rows[_PARTS:], "row") or ("",)
    shown = rows[:_PARTS] if changed else ()
    return Table(title=title, columns=columns, rows=shown, caption=caption, folded=True)


def shown_notes(notes: Sequence[str]) -> tuple[str, ...]:
    """The first ten, clipped, and how many more there are."""
    shown = tuple(clipped(note, 2 * NAME_CHARACTERS) for note in notes[:_NOTES])
    return (*shown, *more(notes[_NOTES:], "note"))


def more(left: Sequence[object], noun: str) -> tuple[str, ...]:
    """What is not shown is counted."""
    return (f"{len(left)} more {noun}{'' if len(left) == 1 else 's'}; --json has all",) if left else ()


def clipped(text: str, limit: int = NAME_CHARACTERS) -> str:
    """The text, control characters spelled out, its middle left out where it is very long."""
    text = visible(text)
    return text if len(text) <= limit else f"{text[: limit // 2]}…{text[-limit // 2 + 1 :]}"
