"""The error class that every prediction prints: what `validate.py` found on its kind of chip, as data."""

from __future__ import annotations

import csv
import datetime
from collections.abc import Iterable, Sequence
from pathlib import Path

from shardlab.hardware.measured import MEASURED
from validation.outcome import Outcome
from validation.scores import score

FILE = MEASURED / "step_errors.csv"
ENOUGH = 5  # rows of a chip, for its errors to say something
HEAD = """\
# Errors of predicted step times by chip, raw: nothing is fitted to these rows.
# Written by experiments/validate.py --error_classes.
# Steps that an eager framework ran are left out: a compiled program is no picture of them.
"""


def error_class_rows(steps: Iterable[Outcome], today: str) -> list[tuple[str, ...]]:
    """chip, rows, mean_error_pct, worst_error_pct, sources, date; of chips with enough rows."""
    by_chip: dict[str, list[Outcome]] = {}
    for row in steps:
        if row.error is not None and row.eager is None:
            by_chip.setdefault(row.chip, []).append(row)
    found = []
    for chip, rows in sorted(by_chip.items()):
        scored = score([(row.measured or 0.0, row.predicted or 0.0) for row in rows])
        if scored is not None and len(rows) >= ENOUGH:
            sources = " ".join(dict.fromkeys(row.source for row in rows))
            figures = (f"{100 * scored.mean:.1f}", f"{100 * scored.worst:.1f}")
            found.append((chip, str(len(rows)), *figures, sources, today))
    return found


def write_error_classes(steps: Sequence[Outcome], path: Path = FILE) -> None:
    """Write them where `prediction.py` reads them."""
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(HEAD)
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("chip", "rows", "mean_error_pct", "worst_error_pct", "sources", "date"))
        writer.writerows(error_class_rows(steps, datetime.date.today().isoformat()))
