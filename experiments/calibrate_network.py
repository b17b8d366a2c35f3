"""How well the network model prices the collectives that others measured, table by table; and the fit itself.

python experiments/calibrate_network.py             # the error of each table, and what INTELLECT-1 implies
python experiments/calibrate_network.py --fit       # the constants of shardlab/hardware/data/links again

Only measured collectives calibrate links: `experiments/data/collectives.csv` (sources and licences:
`experiments/data/README.md`). A row is a kind of collective over groups of so many devices, on the machine
that `MACHINES` names, whose links have the constants. The error is |predicted / measured - 1|. Every row
counts but those that `EXCLUDED` names; a line says which rows its constants were fitted on, if any.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import cache
from pathlib import Path

from absl import app, flags
from validation.sites import implied_rate_lines

from shardlab.cost.collective_time import algorithms, collective_time
from shardlab.cost.shapes import group_shapes
from shardlab.cost.wire import wire_of
from shardlab.hardware.catalog import load_machine
from shardlab.hardware.machine import Machine

FIT = flags.DEFINE_bool("fit", False, "Fit the constants of the links again and print them.")
DATA = Path(__file__).parent / "data" / "collectives.csv"

# (table, hardware) -> machine. Groups are of neighbours, as nccl-tests and XLA's table have them.
MACHINES = {
    ("xla", "sm_90"): "dgx-h100:1x8",
    ("xla", "sm_100_B200"): "dgx-b200:1x8",
    ("xla", "sm_100_GB200"): "gb200-nvl72:18x4",
    ("xla", "sm_103"): "gb200-nvl72:18x4",
    ("azure", "A100"): "azure-nd-a100-v4:1x8",
    ("azure", "H100"): "azure-nd-h100-v5:1x8",
    ("azure", "H200"): "azure-nd-h200-v5:1x8",
    ("vtrain", "A100"): "dgx-a100:1x8",
    ("ml_engineering_b200", "B200 one node"): "aws-p6-b200:1x8",
    ("ml_engineering_b200", "B200 four nodes"): "aws-p6-b200:4x8",
    ("ml_engineering_nvls", "H200"): "dgx-h200:1x8",
    ("ml_engineering_nvls", "B200"): "dgx-b200:1x8",
    ("nccl_reported", "H100"): "dgx-h100:1x8",
    ("nccl_reported", "H200"): "dgx-h200:1x8",
    ("nccl_reported", "H800"): "h800:1x8",
    ("nccl_reported", "GB200"): "gb200-nvl72:18x4",
    ("nccl_reported", "A100"): "dgx-a100:1x8",
    ("nccl_reported", "A100 over PCIe"): "rtx3090+pcie4-x16-p2p:1x8",
    ("nccl_reported", "A100 four NICs"): "dgx-a100+infiniband-hdr-half:3x8",
    ("ironwood", "tpu7x:2x2x1"): "tpu7x:2x2x1",
    ("ironwood", "tpu7x:2x2x2"): "tpu7x:2x2x2",
    ("tpu", "v5e:8x4"): "v5e:8x4",
    ("tpu", "v6e:16x16"): "v6e:16x16",
    ("tpu", "v6e:16x16*2"): "v6e:16x16*2",
}
EXCLUDED = {("vtrain", "V100"): "no V100 here"}
# Link -> the rows that its constants are fitted on, each table as much as every other.
FITTED = {
    "nvlink3": [("azure", "A100"), ("vtrain", "A100")],
    "nvlink4": [("xla", "sm_90"), ("azure", "H100"), ("azure", "H200"), ("ml_engineering_nvls", "H200")],
    "nvlink5": [
        ("xla", "sm_100_B200"),
        ("ml_engineering_b200", "B200 one node"),
        ("ml_engineering_nvls", "B200"),
    ],
    "nvlink5-nvl72": [("xla", "sm_100_GB200")],
    "efa-p6": [("ml_engineering_b200", "B200 four nodes")],
    "ici-v5e": [("tpu", "v5e:8x4")],
    "ici-v6e": [("tpu", "v6e:16x16")],
    "ici-tpu7x": [("ironwood", "tpu7x:2x2x1"), ("ironwood", "tpu7x:2x2x2")],
    "dcn-v6e": [("tpu", "v6e:16x16*2")],
}
# XLA's permutes below 256 MiB contradict themselves (GB200: 750 µs at 16 MiB, 764 at 64, 781 at 256): they
# are scored, on a line of their own, and fit nothing.
SELF_CONTRADICTING = "collective-permute"
LARGE_BYTES = 1 << 24
# Tables of few rows, which have one line for all their hardware.
SMALL_TABLES = ("ml_engineering_nvls", "nccl_reported", "ironwood", "tpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One row: `groups` groups of `size` devices; payload_bytes is S of DESIGN section 3.

    how: which algorithm or pattern, where the source says.
    """

    table: str
    hardware: str
    kind: str
    groups: int
    size: int
    payload_bytes: int
    time_s: float
    how: str

    @property
    def key(self) -> tuple[str, str]:
        """Where its machine stands in MACHINES."""
        return self.table, self.hardware

    @property
    def line(self) -> str:
        """The line of the table of errors that it counts in."""
        if self.kind == SELF_CONTRADICTING:
            return f"{self.table}, {self.kind}"
        return self.table if self.table in SMALL_TABLES else f"{self.table}, {self.hardware}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FitError:
    """Errors of one line, as shares of the measured time. large: the mean of its rows from 16 MiB, if any."""

    line: str
    rows: int
    mean: float
    median: float
    worst: float
    large: float | None
    fitted: bool


@dataclass(frozen=True, slots=True)
class Members:
    """As `cost.collective_time.Joined`."""

    groups: tuple[tuple[int, ...], ...]
    pairs: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Sent:
    """As `cost.collective_time.Sent`."""

    kind: str
    payload_bytes: int
    wire_bytes: Fraction


def read() -> list[Measured]:
    """Every row of the measured tables."""
    with DATA.open(encoding="utf-8", newline="") as file:
        return [
            Measured(
                table=row["table"],
                hardware=row["hardware"],
                kind=row["kind"],
                groups=int(row["groups"]),
                size=int(row["group_size"]),
                payload_bytes=int(row["bytes"]),
                time_s=float(row["time_us"]) * 1e-6,
                how=row["how"],
            )
            for row in csv.DictReader(file)
        ]


@cache
def _members(machine: Machine, kind: str, groups: int, size: int, how: str) -> Members:
    """Groups of neighbours; on a TPU those that its row describes."""
    if kind == "collective-permute":
        shift = {"one-way": size // 2, "pairwise exchange": 1, "ring shift": 1}[how]
        if how == "one-way":
            return Members((), tuple((i, i + shift) for i in range(size // 2)))
        if how == "pairwise exchange":
            return Members((), tuple((i, i ^ 1) for i in range(size)))
        return Members((), tuple((i, (i + 1) % size) for i in range(size)))
    devices = machine.num_devices
    if machine.slices > 1:
        half = machine.devices_per_slice
        return Members(tuple((i, i + half) for i in range(half)))
    if machine.spec == "v5e:8x4":
        return Members(tuple(tuple(range(x, devices, 8)) for x in range(8)))
    if machine.chip.xla_devices == 2:  # all four chips of a plane, each core in a group of its own
        planes = range(0, devices, 2 * size)
        return Members(tuple(tuple(range(p + core, p + 2 * size, 2)) for p in planes for core in (0, 1)))
    return Members(tuple(tuple(range(g * size, (g + 1) * size)) for g in range(groups)))


def predicted_s(row: Measured, machine: Machine) -> float:
    """The model's time of a row; of the algorithm that the source names, where it names one."""
    members = _members(machine, row.kind, row.groups, row.size, row.how)
    gathered = row.kind == "all-gather"
    wire = wire_of(
        kind=row.kind,
        operand_bytes=row.payload_bytes // (row.size if gathered else 1),
        result_bytes=row.payload_bytes,
        groups=members.groups,
        pairs=members.pairs,
    )
    if row.how in ("ring", "nvls"):
        (shape,) = group_shapes(members.groups, machine, None)
        made = algorithms(row.kind, row.payload_bytes, wire.wire_bytes, shape, machine)
        return next(time.total_s for time in made if time.algorithm == row.how)
    time = collective_time(Sent(row.kind, wire.payload_bytes, wire.wire_bytes), members, machine)
    assert time is not None
    return time.total_s


def fit_errors(rows: Sequence[Measured]) -> Iterator[FitError]:
    """Errors by line, in the order of the file; rows of what is excluded are left out."""
    fitted = {key for keys in FITTED.values() for key in keys}
    lines: dict[str, list[float]] = {}
    large: dict[str, list[float]] = {}
    keys: dict[str, Measured] = {}
    for row in rows:
        if row.key in EXCLUDED:
            continue
        predicted = predicted_s(row, load(MACHINES[row.key]))
        error = abs(predicted / row.time_s - 1)
        lines.setdefault(row.line, []).append(error)
        if row.payload_bytes >= LARGE_BYTES:
            large.setdefault(row.line, []).append(error)
        keys[row.line] = row
    for line, errors in lines.items():
        yield FitError(
            line=line,
            rows=len(errors),
            mean=statistics.fmean(errors),
            median=statistics.median(errors),
            worst=max(errors),
            large=statistics.fmean(large[line]) if line in large else None,
            fitted=keys[line].key in fitted and keys[line].kind != SELF_CONTRADICTING,
        )


@cache
def load(spec: str) -> Machine:
    """The machine of this name, read once."""
    return load_machine(spec)


def table_lines(errors: Sequence[FitError]) -> Iterator[str]:
    """The table that the README holds."""
    yield "| measured | rows | mean | median | worst | mean from 16 MiB | fitted |"
    yield "|---|---|---|---|---|---|---|"
    for one in errors:
        figures = (one.mean, one.median, one.worst, one.large)
        shares = " | ".join("–" if share is None else f"{100 * share:.0f} %" for share in figures)
        yield f"| {one.line} | {one.rows} | {shares} | {'yes' if one.fitted else 'no'} |"


# --- the fit: coordinate by coordinate, in the mean of |log(predicted / measured)| -------------------------

FREE = {  # constant -> the field that holds it; latency_s stands beside the calibration
    "nvlink": ("latency_s", "efficiency", "launch_s", "switch_latency_s", "switch_efficiency"),
    "ethernet": ("latency_s",),
    "ici": ("efficiency", "launch_s"),
    "dcn": ("efficiency",),
}
MIN_STEP = 0.003


def _with(machine: Machine, tier: str, values: Mapping[str, float]) -> Machine:
    domains = []
    for domain in machine.domains:
        if domain.tier == tier:
            known = {name: value for name, value in values.items() if name != "latency_s"}
            domain = replace(
                domain,
                latency_s=values.get("latency_s", domain.latency_s),
                calibration=replace(domain.calibration, **known),
            )
        domains.append(domain)
    return replace(machine, domains=tuple(domains))


def loss(rows: Sequence[Measured], tier: str, values: Mapping[str, float]) -> float:
    """Every table counts as much as every other."""
    machines: dict[str, Machine] = {}
    tables: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        spec = MACHINES[row.key]
        if spec not in machines:
            machines[spec] = _with(load(spec), tier, values)
        ratio = predicted_s(row, machines[spec]) / row.time_s
        tables.setdefault(row.key, []).append(abs(math.log(ratio)))
    return statistics.fmean(statistics.fmean(errors) for errors in tables.values())


def shipped_constants(link: str) -> tuple[str, dict[str, float]]:
    """The tier of a link, and those of its constants that a fit may change."""
    machine = load(MACHINES[FITTED[link][0]])
    domain = machine.domains[-1] if link.startswith(("efa", "dcn")) else machine.domains[0]
    now = {**asdict(domain.calibration), "latency_s": domain.latency_s}
    return domain.tier, {name: float(now[name]) for name in FREE[domain.tier] if now[name]}


def fit(link: str, rows: Sequence[Measured]) -> dict[str, float]:
    """The constants of one link that fit its rows best, from those that it has."""
    chosen = [row for row in rows if row.key in FITTED[link] and row.kind != SELF_CONTRADICTING]
    tier, values = shipped_constants(link)
    best, steps = loss(chosen, tier, values), dict.fromkeys(values, 0.3)
    while max(steps.values()) > MIN_STEP:
        for name in values:
            factors = (1 + steps[name], 1 / (1 + steps[name]))
            tried = [{**values, name: values[name] * factor} for factor in factors]
            losses = [loss(chosen, tier, one) for one in tried]
            if min(losses) < best:
                best, values = min(losses), tried[losses.index(min(losses))]
            else:
                steps[name] /= 2
    return values


def main(_: Sequence[str]) -> None:
    """Print the fit or the errors."""
    rows = read()
    if FIT.value:
        for link in FITTED:
            print(link, {name: float(f"{value:.3g}") for name, value in fit(link, rows).items()}, flush=True)
        return
    print("\n".join(table_lines(tuple(fit_errors(rows)))))
    for key, why in EXCLUDED.items():
        print(f"left out: {', '.join(key)}: {sum(row.key == key for row in rows)} rows, {why}")
    print("\n".join(implied_rate_lines()))


if __name__ == "__main__":
    app.run(main)
