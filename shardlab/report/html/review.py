"""The HTML report of a diff: the verdict, what changed, and both sides."""

from __future__ import annotations

from fractions import Fraction

from shardlab.analysis import axes_key
from shardlab.report.change import change_page, in_order, is_changed
from shardlab.report.diff import MOODS, change_cells, diff_page, minus_of
from shardlab.report.figures import key_text, most
from shardlab.report.html.busiest import busiest
from shardlab.report.html.case import made_by, overview
from shardlab.report.html.charts import NARROW, WIDE, Segment, bars
from shardlab.report.html.communication import PHASES, collectives_listing, heat_map
from shardlab.report.html.parts import Block, Card, Chart, Item, Listing, Prose, Report, Tab
from shardlab.review.change import Change, PlanDiff
from shardlab.review.records import Diff, Row, Side
from shardlab.review.verdict import measures, verdict
from shardlab.units import format_bytes

PLANS = 8  # with a tab of their own; what is left out is said


def diff_report(found: Diff) -> Report:
    """What a change does to a step."""
    page, judged = diff_page(found, None), verdict(found)
    tables = [table for table in page.tables if table.title != "What changed"]
    cards = tuple(
        Card(
            label=one.name,
            value=one.text(one.after),
            detail=one.change_text,
            mood="" if not one.change else "bad" if one.change > 0 else "good",
        )
        for one in measures(found)
    )
    changes = Tab(
        name="changes", title="What changed", count=len(found.changes), blocks=change_listing(found)
    )
    sides = (_side_tab("base", "Base", found.base), _side_tab("head", "Head", found.head))
    return Report(
        title=page.title,
        subtitle=f"{found.base.name} → {found.head.name}",
        verdict=judged.text,
        mood=MOODS[judged.what],
        cards=cards,
        tabs=(overview(page, (*tables, *before_after_chart(found))), changes, *sides),
        made_by=made_by(found.head.analysis),
    )


def change_report(change: Change) -> Report:
    """What a change between revisions does: every plan in one table, a tab for each of the worst."""
    page, diffs = change_page(change), [one for one in in_order(change) if is_changed(one)]
    left_out = len(diffs) - PLANS
    more = f"{left_out} more changed plans have no tab here: shardlab diff BASE HEAD --html shows one."
    blocks = (*page.tables, *((Prose(title="", lines=(more,)),) if left_out > 0 else ()))
    return Report(
        title=page.title,
        subtitle=f"{change.base} → {change.head}",
        verdict=dict(page.facts)["verdict"],
        mood="",
        cards=(),
        tabs=(
            overview(page, blocks),
            *(_plan_tab(number, one) for number, one in enumerate(diffs[:PLANS], start=1)),
        ),
        made_by=made_by(diffs[0].found.head.analysis) if diffs else "",
    )


def _plan_tab(number: int, one: PlanDiff) -> Tab:
    found = one.found
    page, judged = diff_page(found, None), verdict(found)
    tables = [table for table in page.tables if table.title != "What changed"]
    said = Prose(title=f"{one.plan} on {one.machine}", lines=(judged.text,), mood=MOODS[judged.what])
    blocks = (said, *tables, *before_after_chart(found), *change_listing(found))
    name = one.plan.rpartition("/")[2].removesuffix(".toml")
    return Tab(name=f"plan-{number}", title=f"{name} on {one.machine}", blocks=blocks)


def change_listing(found: Diff) -> tuple[Block, ...]:
    """Every change, the largest first."""
    if not found.changes:
        return (Prose(title="", lines=("Nothing changed.",), mood="good"),)
    return (
        Listing(
            title="What changed",
            name="changes",
            columns=(
                ("change", False), ("collective", False), ("bytes sent", True), ("phase, layer", False),
                ("source line", False),
            ),
            filters=("change", "kind", "axes", "phase"),
            items=tuple(_item(row) for row in found.changes),
            caption="bytes per device and step; source lines of what is there now, else of what was",
        ),
    )  # fmt: skip


def _item(row: Row) -> Item:
    flow = (*row.head, *row.base)[0]
    keys = (row.what, flow.kind, key_text(axes_key(flow.axes)), flow.phase)
    return Item(
        cells=change_cells(row), order=(None, None, float(most(minus_of(row))), None, None), keys=keys
    )


def before_after_chart(found: Diff) -> tuple[Chart, ...]:
    """Bytes over each set of axes, before and after, by phase."""
    bars_of: dict[tuple[str, str, str], Fraction] = {}
    for row in found.rows:
        for side, flows in (("base", row.base), ("head", row.head)):
            for flow in flows:
                key = (key_text(axes_key(flow.axes)), side, flow.phase)
                bars_of[key] = bars_of.get(key, Fraction(0)) + most(flow.amounts.wire_bytes)
    sums: dict[str, Fraction] = {}
    for (name, _, _), value in bars_of.items():
        sums[name] = sums.get(name, Fraction(0)) + value
    axes = sorted(sums, key=lambda name: -sums[name])
    segments, totals = [], {}
    for name in axes:
        for side in ("base", "head"):
            bar, whole = f"{name}, {side}", Fraction(0)
            for phase in PHASES:
                value = bars_of.get((name, side, phase), Fraction(0))
                segments.append(Segment(bar, phase, float(value), format_bytes(value)))
                whole += value
            totals[bar] = format_bytes(whole)
    if not any(segment.value for segment in segments):
        return ()
    wide, narrow = (bars(segments, PHASES, width, totals=totals) for width in (WIDE, NARROW))
    return (
        Chart(
            title="Bytes sent over each set of mesh axes, before and after",
            alt="; ".join(f"{bar}: {text}" for bar, text in totals.items()),
            wide=wide,
            narrow=narrow,
            legend={name: PHASES[name] for name in PHASES if any(key[2] == name for key in bars_of)},
            caption="at most, per device and step; every branch of a conditional and every stage counts",
        ),
    )


def _side_tab(name: str, title: str, side: Side) -> Tab:
    if side.analysis is None:
        why = side.why_not or "There is no analysis."
        return Tab(name=name, title=title, blocks=(Prose(title=side.name, lines=(why,), mood="warn"),))
    blocks: tuple[Block, ...] = (*heat_map(busiest(side.analysis)), *collectives_listing(side.analysis))
    return Tab(name=name, title=title, blocks=blocks, count=len(side.analysis.collectives))
