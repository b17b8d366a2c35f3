"""The table of the wire lab: a row for each plan on each network, as CSV and as lines of text."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from wire_cores import StepRates

from shardlab.errors import Problem, UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One plan on one network. Bytes and seconds per step, of the site that sends most.

    gloo_header_bytes: of gloo's own headers, predicted, which the measured bytes contain. site_error: the
    largest |measured / (predicted + headers) - 1| over all sites. predicted_step_s: None where a part of it
    is unknown; predicted_communication_s: the part of it in which nothing is computed; predicted_turns_s: how
    much shorter or longer it is when gloo's ranks never or always take turns. measured_step_s: the median of
    the runs, each the median of its steps; the least and the most of them beside it. link_share: the least
    that a plain stream had of the rate before or after one of them; cores_change: by how much the step of one
    device changed over one of them, as a share of the run's step, the most; cores_…: that step beside the run
    that the row is of, and what the prediction takes for all cores together (`wire_control.py`). None where
    only bytes matter.
    loopback: of that site, between its own devices. startup_bytes: sent before the first step.
    idle_bytes_per_s: sent while nothing is computed. frame_bytes: what crossed the link, headers and
    acknowledgements included. measured_cpu_s: of all processes.
    """

    plan: str
    sites: int
    devices_per_site: int
    link_mbit_per_s: float
    predicted_wire_bytes: int
    measured_wire_bytes: int
    predicted_step_s: float | None
    measured_step_s: float
    predicted_communication_s: float | None
    predicted_turns_s: float | None
    gloo_header_bytes: int
    site_error: float
    predicted_loopback_bytes: int
    measured_loopback_bytes: int
    frame_bytes: int
    startup_bytes: int
    idle_bytes_per_s: int
    measured_cpu_s: float
    least_step_s: float
    most_step_s: float
    link_share: float | None = None
    cores_change: float | None = None
    cores_step_s: float | None = None
    cores_bf16_flops_per_s: float | None = None
    cores_dot_bf16_flops_per_s: float | None = None
    cores_memory_bytes_per_s: float | None = None

    @property
    def cores(self) -> StepRates | None:
        """What the prediction took; None: what `lab.toml` says."""
        found = {field.name: getattr(self, f"cores_{field.name}") for field in fields(StepRates)}
        return None if None in found.values() else StepRates(**found)


def say(row: Row) -> None:
    """One line of the table on standard output."""
    said, waited = row.predicted_step_s, row.predicted_communication_s
    turns = "" if not row.predicted_turns_s else f" ± {row.predicted_turns_s:.3f}"
    beside = "unknown" if said is None else f"{said:.3f}{turns} ({row.measured_step_s / said:.2f})"
    runs = f" ({row.least_step_s:.3f} to {row.most_step_s:.3f})" if row.least_step_s < row.most_step_s else ""
    near = ""
    if row.link_share is not None and row.cores_step_s is not None:
        near = f", a stream has {row.link_share:.2f} of the rate, one device {row.cores_step_s:.3f} s"
        near += f" (changed by {row.cores_change:.0%} of a step)"
    links = "" if not said or waited is None else f", {waited / said:.0%} of that the link's"
    print(
        f"{row.plan:9} {row.sites} x {row.devices_per_site} at {row.link_mbit_per_s:g} Mbit/s: "
        f"{row.measured_wire_bytes:,} bytes of {row.predicted_wire_bytes:,} and {row.gloo_header_bytes:,} of "
        f"headers (sites off {row.site_error:.2%} at most), loopback {row.measured_loopback_bytes:,} of "
        f"{row.predicted_loopback_bytes:,}; {row.measured_step_s:.3f} s{runs} of {beside}{links}"
        f"{near}, {row.measured_cpu_s:.2f} s of cores; start-up {row.startup_bytes:,}, idle "
        f"{row.idle_bytes_per_s:,}/s",
        flush=True,
    )


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """The table so far."""
    names = [field.name for field in fields(Row)]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows([getattr(row, name) for name in names] for row in rows)


def read_csv(path: Path) -> list[Row]:
    """A table of before. Raises UserError when it is none."""
    try:
        with path.open(newline="") as file:
            return [
                Row(**{field.name: _value(str(field.type), row[field.name]) for field in fields(Row)})
                for row in csv.DictReader(file)
            ]
    except (OSError, KeyError, ValueError) as error:
        what = f"is no table of the wire lab: {error}"
        raise UserError(Problem(f"--measured={path}", what, "give a file that --csv wrote")) from None


def _value(kind: str, text: str) -> str | int | float | None:
    if kind == "str":
        return text
    return None if not text else int(text) if kind == "int" else float(text)
