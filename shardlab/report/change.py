"""The page of `shardlab diff` between revisions: every plan in one table, then what changed in each; also as
one GitHub comment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from fractions import Fraction

from shardlab.report.diff import (
    COMMENT_CHARACTERS,
    COMMENT_ROWS,
    MOODS,
    NAME_CHARACTERS,
    clipped,
    diff_page,
    more,
    shown_notes,
)
from shardlab.report.markdown import plain, to_markdown
from shardlab.report.page import Cell, Column, Page, Table, cell
from shardlab.review.change import Change, PlanDiff
from shardlab.review.verdict import Judgement, measures, verdict

COMMENT_PLANS = 10  # whose details a comment has
_TABLE_ROWS, _NAMES = 40, 20
# Rows of the table, plans with details and changes of each, until the comment fits.
_SIZES = (
    *((_TABLE_ROWS, plans, COMMENT_ROWS) for plans in (COMMENT_PLANS, 5, 3, 1)),
    *((_TABLE_ROWS, plans, rows) for plans, rows in ((3, 3), (1, 3), (1, 1), (0, 0))),
    (20, 0, 0),
    (5, 0, 0),
)
_ORDER: tuple[Judgement, ...] = ("worse", "mixed", "unknown", "added", "deleted", "better", "same")
_SAID = ("added", "deleted", "same")  # whose row has all there is to say


def change_page(change: Change, rows: int | None = None) -> Page:
    """All plans, the worst first. rows: of the table, all unless said."""
    diffs = in_order(change)
    shown = diffs if rows is None else diffs[:rows]
    columns = (Column("plan"), Column("on"), Column("verdict", keep=False))
    table = Table(
        title="Plans",
        columns=columns,
        rows=tuple(_row(one) for one in shown),
        caption=(*more(diffs[len(shown) :], "plan"), "")[0],
    )
    notes = (*change.limits, *change.notes)
    return Page(
        title="What the change does",
        facts=(
            ("verdict", clipped(_verdict(change), 400)),
            ("base", clipped(change.base)),
            ("head", clipped(change.head)),
            *_same(change),
        ),
        tables=(table,) if shown else (),
        notes=shown_notes(notes),
    )


def change_pages(change: Change) -> Iterator[Page]:
    """All plans, then each of which there is more to say."""
    yield change_page(change)
    for one in filter(is_changed, in_order(change)):
        yield diff_page(one.found, COMMENT_ROWS)


def change_comment(change: Change) -> str:
    """One comment, however many plans: the table, and the details of the first ten folded away."""
    for rows, plans, top in _SIZES:
        text = _comment(change, rows, plans, top)
        if len(text) <= COMMENT_CHARACTERS:
            return text
    raise AssertionError("five rows of clipped names and no details fit")


def in_order(change: Change) -> list[PlanDiff]:
    """Worst first, and of those that are alike the one that sends most more."""
    return sorted(
        change.diffs,
        key=lambda one: (_ORDER.index(verdict(one.found).what), -_more_bytes(one), one.plan, one.machine),
    )


def is_changed(one: PlanDiff) -> bool:
    """Whether there is more to say about a plan than its row does."""
    return verdict(one.found).what not in _SAID


def _comment(change: Change, rows: int, plans: int, top: int) -> str:
    changed = [one for one in in_order(change) if is_changed(one)]
    blocks = [to_markdown(change_page(change, rows)).rstrip()]
    blocks += [_folded(one, top) for one in changed[:plans]]
    if changed[plans:]:
        blocks.append(plain(more(changed[plans:], "changed plan")[0]))
    return "\n\n".join(blocks) + "\n"


def _folded(one: PlanDiff, top: int) -> str:
    """A plan's page under its verdict."""
    title = clipped(f"{one.plan} on {one.machine}: {verdict(one.found).text}", 400)
    page = to_markdown(diff_page(one.found, top)).partition("\n\n")[2].rstrip()  # its heading is the summary
    return f"<details><summary>{plain(title)}</summary>\n\n{page}\n\n</details>"


def _row(one: PlanDiff) -> tuple[Cell, ...]:
    judged = verdict(one.found)
    texts = (clipped(one.plan), clipped(one.machine))
    return (*map(cell, texts), cell(clipped(judged.text, 2 * NAME_CHARACTERS), MOODS[judged.what]))


def _verdict(change: Change) -> str:
    """`1 worse, 2 added; 3 with the same program; 12 untouched`; of a single plan its own."""
    judged = [verdict(one.found) for one in change.diffs]
    if len(judged) == 1 and not change.same:
        return judged[0].text
    counted = Counter(one.what for one in judged)
    parts = [f"{counted[what]} {_word(what)}" for what in _ORDER if counted[what]]
    if change.same:
        parts.append(f"{len(change.same)} untouched")
    return ", ".join(parts) if judged else f"No plan changed: {parts[0]}"


def _word(what: str) -> str:
    return {"same": "without a change", "unknown": "that cannot run"}.get(what, what)


def _same(change: Change) -> tuple[tuple[str, str], ...]:
    if not change.same:
        return ()
    names = ", ".join(clipped(name, 80) for name in change.same[:_NAMES])
    left = more(change.same[_NAMES:], "plan")
    return (("untouched", "; ".join((names, *left))),)


def _more_bytes(one: PlanDiff) -> Fraction:
    found = next((measure for measure in measures(one.found) if measure.name == "bytes sent"), None)
    return Fraction(0) if found is None else found.change
