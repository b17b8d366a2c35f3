"""Progress of a long run: a moving line on a terminal, one plain line per result elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO


class Progress(Protocol):
    """What a run tells about itself. Called from one thread."""

    def finish(self, label: str, outcome: str) -> None:
        """One more case is done."""


class Quiet:
    """Says nothing."""

    def finish(self, label: str, outcome: str) -> None:
        """Nothing."""


class PlainProgress:
    """One line per finished case: `[3/12] fsdp8 on cpu:8: analysed in 4.1 s`; a total of 0 is not known."""

    def __init__(self, stream: TextIO, total: int) -> None:
        self.stream, self.total, self.done = stream, total, 0

    def finish(self, label: str, outcome: str) -> None:
        """Write the line."""
        self.done += 1
        count = f"{self.done}/{self.total}" if self.total else f"{self.done}"
        self.stream.write(f"[{count}] {label}: {outcome}\n")
        self.stream.flush()


@contextmanager
def progress_on(stream: TextIO, total: int) -> Iterator[Progress]:
    """The progress that suits the stream."""
    if not stream.isatty():
        yield PlainProgress(stream, total)
        return
    with _bar(stream, total) as progress:
        yield progress


@contextmanager
def _bar(stream: TextIO, total: int) -> Iterator[Progress]:
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.SpinnerColumn(),
        bars.TextColumn("{task.completed}/{task.total} compiled", markup=False),
        bars.TimeElapsedColumn(),
        bars.TextColumn("{task.description}", markup=False),
    )
    console = Console(file=stream, markup=False, highlight=False)
    with bars.Progress(*columns, console=console, transient=True) as bar:
        yield _Bar(bar, bar.add_task("", total=total or None))


class _Bar:
    """A rich progress bar as Progress."""

    def __init__(self, bar: object, task: object) -> None:
        self.bar, self.task, self.started_s = bar, task, time.monotonic()

    def finish(self, label: str, outcome: str) -> None:
        self.bar.update(self.task, advance=1, description=f"{label}: {outcome}")  # type: ignore[attr-defined]
