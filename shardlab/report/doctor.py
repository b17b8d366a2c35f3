"""The page of `shardlab doctor`: which targets work here, and the command that adds each of the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from shardlab.report.page import Column, Page, Table, cell


class Status(Protocol):
    """What the page shows of a target; `compile.doctor.TargetStatus` is one."""

    @property
    def target(self) -> str:
        """`cpu`, `tpu`, `gpu`, `attached`, or a chip."""

    @property
    def works(self) -> bool:
        """Whether this machine can compile for it."""

    @property
    def detail(self) -> str:
        """Versions found, or what is missing."""

    @property
    def install(self) -> str:
        """The command that adds it, "" when there is none."""


def doctor_page(statuses: Iterable[Status]) -> Page:
    """One row per target."""
    columns = (
        Column("target"),
        Column("works"),
        Column("found", keep=False),
        Column("to add it", keep=False),
    )
    rows = tuple(
        (
            cell(status.target, "strong"),
            cell("yes", "good") if status.works else cell("no", "warn"),
            cell(status.detail),
            cell(status.install),
        )
        for status in statuses
    )
    return Page(
        title="What this machine can compile for",
        tables=(Table(title="Targets", columns=columns, rows=rows),),
    )
