"""The table of `--order`: what each link carries under other device orders, and how to get them."""

from __future__ import annotations

from dataclasses import replace

from shardlab.order import OrderResult, Orders
from shardlab.report.figures import NONE, largest_first
from shardlab.report.page import Cell, Column, Line, Page, Table, cell, lines
from shardlab.units import format_bytes, format_seconds

TITLE = "Device orders: the same program, its devices placed otherwise"


def with_orders(page: Page, orders: Orders | None) -> Page:
    """The page with the table of orders at its head and what is to be known about them among its notes."""
    if orders is None:
        return page
    return replace(page, tables=(orders_table(orders), *page.tables), notes=(*page.notes, *orders.notes))


def orders_table(orders: Orders) -> Table:
    """Best first; figures are per device and step."""
    columns = (
        Column("#", "right"),
        Column("order", keep=False),
        Column("traffic per link"),
        Column("comm. time", "right"),
        Column("how to get it", keep=False),
    )
    rows = tuple(
        (cell(str(rank), "strong"), *_row(result)) for rank, result in enumerate(orders.results, start=1)
    )
    return Table(title=TITLE, columns=columns, rows=rows, caption=_caption(orders))


def _row(result: OrderResult) -> tuple[Cell, ...]:
    sent = [f"{tier} {format_bytes(value)}" for tier, value in largest_first(result.tiers)]
    time = NONE if result.communication_s is None else format_seconds(result.communication_s)
    own = (Line("the program's own", "dim"),) if result.own else ()
    return (
        (Line(result.name), *own),
        lines(sent) if sent else cell("nothing"),
        cell(time),
        cell(result.how, "dim"),
    )


def _caption(orders: Orders) -> str:
    tried = "1 order tried" if orders.tried == 1 else f"{orders.tried} orders tried"
    rest = "" if orders.complete else ", there are more"
    by = "communication time" if orders.by == "time" else "bytes on the outermost link"
    lists = "; --json prints the device_ids" if any("device_ids" in one.how for one in orders.results) else ""
    return f"{tried}{rest}; ranked by {by}; those that cost the same are shown once{lists}"
