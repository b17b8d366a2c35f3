"""The table of `--straggler`: the step with one slow device."""

from __future__ import annotations

from dataclasses import replace

from shardlab.report.page import Column, Page, Table, cell
from shardlab.straggler import Straggler, Stragglers
from shardlab.units import format_seconds

MAX_ROWS = 8


def with_stragglers(page: Page, found: Stragglers | None) -> Page:
    """The page with the table at its head."""
    return page if found is None else replace(page, tables=(stragglers_table(found), *page.tables))


def stragglers_table(found: Stragglers) -> Table:
    """Worst first. Of many kinds of devices the `MAX_ROWS` that cost most."""
    columns = (Column("slow device", keep=False), Column("step time", "right"), Column("longer by", "right"))
    worst = sorted(found.slow, key=lambda one: -one.step_time_s)
    left = len(worst) - MAX_ROWS
    caption = f"step time of even devices: {format_seconds(found.step_time_s)}"
    return Table(
        title=f"One slow device: its compute takes {found.slowdown:g} times as long, the others wait for it",
        columns=columns,
        rows=tuple(
            (
                cell(f"one of {one.devices}" if one.devices else "any one"),
                cell(format_seconds(one.step_time_s)),
                cell(_longer(one, found)),
            )
            for one in worst[:MAX_ROWS]
        ),
        caption=caption + (f"; {left} more that cost less" if left > 0 else ""),
    )


def _longer(one: Straggler, found: Stragglers) -> str:
    return f"{(one.step_time_s / found.step_time_s - 1) * 100:.3g} %"
