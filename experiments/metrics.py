"""Metrics of training: one record per step, to standard error, a CSV file and TensorBoard."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from shardlab.errors import Problem, UserError

FIELDS = ("step", "loss", "gradient_norm", "tokens_per_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Metrics of one step. loss: nats per byte; tokens_per_s: over all devices, since the last report."""

    step: int
    loss: float
    gradient_norm: float
    tokens_per_s: float

    def values(self) -> tuple[float, ...]:
        """In the order of FIELDS."""
        return self.step, self.loss, self.gradient_norm, self.tokens_per_s


Report = Callable[[Record], None]


@contextmanager
def open_reports(
    *, steps: int, every: int, first_step: int = 1, metrics: str | None = None, tensorboard: str | None = None
) -> Iterator[Report]:
    """Where metrics go: standard error every so many steps, and the files that were asked for.

    first_step: that this run takes; rows of the CSV file before it, of the run that it goes on from, stay.
    """

    def print_progress(record: Record) -> None:
        if record.step % every == 0 or record.step == steps:
            rate = f"{record.tokens_per_s:,.0f} tokens/s"
            sys.stderr.write(f"step {record.step}/{steps}  loss {record.loss:.4f}  {rate}\n")

    with ExitStack() as stack:
        reports: list[Report] = [print_progress]
        if metrics:
            reports.append(stack.enter_context(open_table(Path(metrics), first_step)))
        if tensorboard:
            reports.append(stack.enter_context(open_tensorboard(tensorboard)))

        def report(record: Record) -> None:
            for one in reports:
                one(record)

        yield report


@contextmanager
def open_table(path: Path, first_step: int) -> Iterator[Report]:
    """A CSV file, each row written when it is there, since a run may be killed at any moment."""
    kept = []
    if first_step > 1 and path.exists():
        with path.open(newline="") as file:
            rows = [row for row in csv.reader(file) if len(row) == len(FIELDS)]
        kept = [row for row in rows if row[0].isdecimal() and int(row[0]) < first_step]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(FIELDS)
        writer.writerows(kept)

        def report(record: Record) -> None:
            writer.writerow(record.values())
            file.flush()

        yield report


@contextmanager
def open_tensorboard(folder: str) -> Iterator[Report]:
    """Event files in `folder`. Raises UserError without tensorboardX."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        what = "tensorboardX is not installed"
        raise UserError(Problem("--tensorboard", what, "pip install 'shardlab[train]'")) from None
    with SummaryWriter(folder) as writer:

        def report(record: Record) -> None:
            for name, value in zip(FIELDS[1:], record.values()[1:], strict=True):
                writer.add_scalar(name, value, record.step)

        yield report
