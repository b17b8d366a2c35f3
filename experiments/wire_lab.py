"""The wire lab: run plans over real links between network namespaces, and hold the predictions against them.

sudo python experiments/wire_lab.py --sites=2,4 --devices=1,2 --rates=100 --csv=wire.csv

Needs Linux, root, iproute2 and the [train] extra. A site is a network namespace with one process of
`train.py`; its link is shaped with `tc tbf`. Every plan is first compiled and analysed as `shardlab explain
--on=experiments/lab.toml:2x1` does it; then it runs, and interface counters are read before and after each
step. Bytes are TCP payload, frames less 66 bytes of headers each, which --bulk checks with a plain TCP stream
through the same links. What joining and compiling send, and what an idle run does, is counted apart, and so
is the loopback interface between the devices of one site.
"""

from __future__ import annotations

import csv
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from absl import app, flags
from sites import HEADER_BYTES, Sites, check_privileges
from wire_plans import PLANS

from shardlab.analysis import CollectiveRow, attribute
from shardlab.case_report import report_case
from shardlab.compile import compile_case
from shardlab.cost.gloo import gloo_collective, header_bytes
from shardlab.errors import Problem, ShardlabError, UserError
from shardlab.hardware.catalog import load_machine
from shardlab.hardware.machine import Machine
from shardlab.program import Program
from shardlab.spec.case import Case, make_case
from shardlab.spec.plan import load_plan

_PLANS = flags.DEFINE_list("plans", list(PLANS), f"Which of {', '.join(PLANS)}.")
_SITES = flags.DEFINE_list("sites", ["2"], "Numbers of sites.")
_DEVICES = flags.DEFINE_list("devices", ["1"], "Devices per site.")
_RATES = flags.DEFINE_list("rates", ["100"], "Mbit/s of each site's link, each way.")
_WARM = flags.DEFINE_integer("warm_steps", 2, "Steps before the first that counts.", lower_bound=1)
_STEPS = flags.DEFINE_integer("count_steps", 4, "Steps that count.", lower_bound=1)
_CSV = flags.DEFINE_string("csv", None, "Table to write.", allow_override=True)  # validate has one too
_BULK = flags.DEFINE_bool("bulk", True, "First send a plain TCP stream through the links.")
_PORT = 9911
_ROW_TIMEOUT_S = 300
_PYTHON = sys.executable
LAB = Path(__file__).with_name("lab.toml")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One plan on one network. Bytes and seconds per step, of the site that sends most.

    gloo_header_bytes: of gloo's own headers, predicted, which the measured bytes contain. site_error: the
    largest |measured / (predicted + headers) - 1| over all sites. loopback: of that site, between its own
    devices. startup_bytes: sent before the first step. idle_bytes_per_s: sent while nothing is computed.
    frame_bytes: what crossed the link, headers and acknowledgements included. measured_cpu_s: of all
    processes.
    """

    plan: str
    sites: int
    devices_per_site: int
    link_mbit_per_s: float
    predicted_wire_bytes: int
    measured_wire_bytes: int
    predicted_step_s: float
    measured_step_s: float
    gloo_header_bytes: int
    site_error: float
    predicted_loopback_bytes: int
    measured_loopback_bytes: int
    frame_bytes: int
    startup_bytes: int
    idle_bytes_per_s: int
    measured_cpu_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """Bytes that each site sends to others and within itself, per step, gloo's headers on the former, and the
    step's time."""

    out_bytes: tuple[Fraction, ...]
    loopback_bytes: tuple[Fraction, ...]
    gloo_bytes: tuple[int, ...]
    step_s: float


def machine_file(folder: Path, rate_mbit_per_s: float) -> Path:
    """`lab.toml` with links of this rate."""
    path = folder / f"lab-{rate_mbit_per_s:g}m.toml"
    text, found = re.subn(
        r"(?m)^uplink_bytes_per_s = .*$", f"uplink_bytes_per_s = {rate_mbit_per_s * 125_000}", LAB.read_text()
    )
    assert found == 1
    path.write_text(text)
    return path


def predict(case: Case, program: Program, machine: Machine) -> Predicted:
    """What the compiled program will send and take on `machine`, whose hosts are the sites."""
    (part,) = attribute(program, machine=machine)
    per_site = machine.num_devices // machine.hosts
    out, inside = [Fraction(0)] * machine.hosts, [Fraction(0)] * machine.hosts
    headers = [0] * machine.hosts
    rows = zip(part.analysis.collectives, part.members, part.collectives, strict=True)
    for row, joined, collective in rows:
        found = gloo_collective(row.kind, row.payload_bytes, joined.groups, joined.pairs)
        for (source, target), sent in found.sends.items():
            site, other = source // per_site, target // per_site
            (inside if site == other else out)[site] += sent * runs_on(row, source)
        arrays = len(collective.instruction.operands) if row.kind != "all-to-all" else 1
        for (source, target), sent in header_bytes(row.kind, found.sends, row.group_size).items():
            if source // per_site != target // per_site:
                headers[source // per_site] += sent * arrays * runs_on(row, source)
    report = report_case(case, program, machine)
    step_s = report.step_time_s if report.step_time_s is not None else report.communication_s
    return Predicted(
        out_bytes=tuple(out),
        loopback_bytes=tuple(inside),
        gloo_bytes=tuple(headers),
        step_s=step_s or 0.0,
    )


def runs_on(row: CollectiveRow, device: int) -> int:
    """How often a device runs a collective. Raises UserError where that is not known."""
    ranges = [row.executions]
    for runs in row.by_device or ():
        for part in runs.devices.split(","):
            first, _, last = part.partition("-")
            if int(first) <= device <= int(last or first):
                ranges = [runs.executions]
    low, high = ranges[0]
    if low != high:
        raise UserError(Problem(row.name, f"runs {low} to {high} times", "the lab needs exact plans"))
    return low


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Per step and site: payload sent over the link and over loopback, frames; and the step's time."""

    out_bytes: tuple[float, ...]
    loopback_bytes: tuple[float, ...]
    frame_bytes: tuple[float, ...]
    step_s: float
    startup_bytes: int
    idle_bytes_per_s: float
    cpu_s: float
    losses: tuple[float, ...]


def measure(sites: Sites, folder: Path, mesh: Path, case: Case, *, warm: int, steps: int) -> Measured:
    """Run the case, one process per site. Raises UserError when a process fails or does not end."""
    processes = start(sites, folder, mesh, case, warm + steps)
    wait(processes, folder)
    return read_measured([read_rows(folder, site) for site in range(len(processes))], warm=warm, steps=steps)


def start(sites: Sites, folder: Path, mesh: Path, case: Case, steps: int) -> list[subprocess.Popen[str]]:
    """One process per site; what they count and say is in `siteN.jsonl` and `siteN.log`."""
    count, processes = len(sites.names), []
    for site in range(count):
        counters = folder / f"site{site}.jsonl"
        counters.unlink(missing_ok=True)
        command = [
            _PYTHON, str(Path(__file__).with_name("wire_worker.py")), f"--mesh={mesh}",
            f"--on={case.machine}", f"--model={case.model.name}", f"--batch={case.batch}",
            f"--seq={case.seq}", f"--steps={steps}", f"--counters={counters}",
            f"--coordinator={sites.address(0)}:{_PORT}", f"--process_id={site}",
            f"--num_processes={count}", "--max_text_mb=0.2",
        ]  # fmt: skip
        with (folder / f"site{site}.log").open("w") as log:
            processes.append(sites.start(site, command, stdout=log, stderr=log))
    return processes


def read_rows(folder: Path, site: int) -> list[dict[str, Any]]:
    """What a site has counted so far."""
    path = folder / f"site{site}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def wait(processes: Sequence[subprocess.Popen[str]], folder: Path) -> None:
    """Until all have ended well. Raises UserError with the last words of the first that did not."""
    deadline_s = time.monotonic() + _ROW_TIMEOUT_S
    while any(process.poll() is None for process in processes):
        failed = [site for site, process in enumerate(processes) if process.poll()]
        if failed or time.monotonic() > deadline_s:
            site = failed[0] if failed else 0
            said = (folder / f"site{site}.log").read_text().strip().splitlines()[-1:]
            what = f"ended with {processes[site].poll()}" if failed else f"no end within {_ROW_TIMEOUT_S} s"
            raise UserError(Problem(f"site {site}", f"{what}: {' '.join(said)}", "see its output"))
        time.sleep(0.1)


def read_measured(rows_of_sites: Sequence[list[dict[str, Any]]], *, warm: int, steps: int) -> Measured:
    """Differences of counters over the steps that count."""
    out, inside, frames, durations, busy = [], [], [], [], []
    for rows in rows_of_sites:
        at = {row["step"]: row for row in rows}
        first, last = at[warm], at[warm + steps]
        out.append(payload(first, last, "eth0") / steps)
        inside.append(payload(first, last, "lo") / steps)
        frames.append((last["eth0"][2] - first["eth0"][2]) / steps)
        busy.append((last["cpu_s"] - first["cpu_s"]) / steps)
        times = [at[step]["time_s"] for step in range(warm, warm + steps + 1)]
        durations.append(median(b - a for a, b in pairwise(times)))
    one = {row["step"]: row for row in rows_of_sites[0]}
    idle_s = one[-2]["time_s"] - one[warm + steps]["time_s"]
    return Measured(
        out_bytes=tuple(out),
        loopback_bytes=tuple(inside),
        frame_bytes=tuple(frames),
        step_s=max(durations),
        startup_bytes=max(payload(rows[0], rows[1], "eth0") for rows in rows_of_sites),
        idle_bytes_per_s=payload(one[warm + steps], one[-2], "eth0") / idle_s,
        cpu_s=sum(busy),
        losses=tuple(row["loss"] for row in rows_of_sites[0] if row["loss"] is not None),
    )


def payload(first: dict[str, Any], last: dict[str, Any], interface: str) -> int:
    """TCP payload that an interface sent between two readings."""
    sent, packets = (last[interface][i] - first[interface][i] for i in (2, 3))
    return sent - HEADER_BYTES * packets


_STREAM = """
import socket, sys, time
sending, peer, size = sys.argv[1] == "send", sys.argv[2], int(sys.argv[3])
def count():
    line = next(line for line in open("/proc/net/dev") if "eth0" in line)
    return [int(value) for value in line.split(":")[1].split()]
if sending:
    for _ in range(200):
        try:
            stream = socket.create_connection((peer, 5555))
            break
        except OSError:
            time.sleep(0.05)
else:
    stream = socket.create_server(("", 5555)).accept()[0]
time.sleep(0.3)
before, started = count(), time.monotonic()
if sending:
    stream.sendall(bytes(size))
    stream.recv(1)
    took = time.monotonic() - started
    time.sleep(0.2)
    after = count()
    print(after[8] - before[8], after[9] - before[9], after[0] - before[0], took)
else:
    left = size
    while left:
        left -= len(stream.recv(min(left, 1 << 20)))
    stream.send(b"x")
"""


def bulk(sites: Sites, size_bytes: int) -> tuple[int, int, int, float]:
    """A plain TCP stream from site 0 to site 1: frame bytes and frames sent, bytes of acknowledgements that
    came back, seconds."""
    command = [_PYTHON, "-c", _STREAM]
    sites.start(1, [*command, "receive", "-", str(size_bytes)])
    sender = sites.start(0, [*command, "send", sites.address(1), str(size_bytes)], stdout=subprocess.PIPE)
    told, _ = sender.communicate(timeout=_ROW_TIMEOUT_S)
    sent, packets, back, took = told.split()
    return int(sent), int(packets), int(back), float(took)


def say_bulk(rate: float) -> None:
    """How many headers a bulk stream has on these links, on standard error."""
    with Sites(2, rate) as sites:
        size = int(min(max(rate * 125_000 * 2, 1e6), 50e6))
        sent, packets, back, took = bulk(sites, size)
    left = sent - HEADER_BYTES * packets
    sys.stderr.write(
        f"bulk TCP, {size:,} bytes at {rate:g} Mbit/s: {sent:,} bytes in {packets:,} frames "
        f"({sent / size:.4f} of the payload; less {HEADER_BYTES} each: {left:,}), acknowledgements "
        f"{back / size:.4f}, {size * 8 / took / 1e6 / rate:.3f} of the rate as payload\n"
    )


def run_lab() -> Iterator[Row]:
    """Every combination of the flags that the plan can be put on."""
    programs: dict[tuple[str, int], Program] = {}
    with tempfile.TemporaryDirectory(prefix="shardlab-wire-") as name:
        folder = Path(name)
        for sites, devices, plan in combinations():
            mesh = folder / f"{plan}{sites * devices}.toml"
            mesh.write_text(PLANS[plan].text(sites * devices))
            for rate in map(float, _RATES.value):
                yield one_row(folder, mesh, plan, sites, devices, rate, programs)


def combinations() -> Iterator[tuple[int, int, str]]:
    """Sites, devices per site and plan. Raises UserError for an unknown plan."""
    for plan in _PLANS.value:
        if plan not in PLANS:
            raise UserError(Problem(f"--plans={plan}", "unknown plan", f"known: {', '.join(PLANS)}"))
    for sites in map(int, _SITES.value):
        for devices in map(int, _DEVICES.value):
            for plan in _PLANS.value:
                yield sites, devices, plan


def one_row(
    folder: Path,
    mesh: Path,
    plan: str,
    sites: int,
    devices: int,
    rate: float,
    programs: dict[tuple[str, int], Program],
) -> Row:
    """Predict, then measure."""
    on = f"{machine_file(folder, rate)}:{sites}x{devices}"
    made = PLANS[plan]
    case = make_case(load_plan(mesh), made.model, on, made.batch, made.seq)
    key = plan, sites * devices
    if key not in programs:
        programs[key] = compile_case(case)
    predicted = predict(case, programs[key], load_machine(on))
    with Sites(sites, rate) as network:
        measured = measure(network, folder, mesh, case, warm=_WARM.value, steps=_STEPS.value)
    return beside(plan, sites, devices, rate, predicted, measured)


def beside(plan: str, sites: int, devices: int, rate: float, predicted: Predicted, measured: Measured) -> Row:
    """Prediction and measurement as a row of the table."""
    errors = [
        abs(found / float(said + headers) - 1)
        for said, headers, found in zip(
            predicted.out_bytes, predicted.gloo_bytes, measured.out_bytes, strict=True
        )
        if said
    ]
    most = max(range(sites), key=lambda site: predicted.out_bytes[site])
    return Row(
        plan=plan,
        sites=sites,
        devices_per_site=devices,
        link_mbit_per_s=rate,
        predicted_wire_bytes=round(predicted.out_bytes[most]),
        measured_wire_bytes=round(measured.out_bytes[most]),
        predicted_step_s=round(predicted.step_s, 4),
        measured_step_s=round(measured.step_s, 4),
        gloo_header_bytes=predicted.gloo_bytes[most],
        site_error=round(max(errors, default=0.0), 4),
        predicted_loopback_bytes=round(predicted.loopback_bytes[most]),
        measured_loopback_bytes=round(measured.loopback_bytes[most]),
        frame_bytes=round(measured.frame_bytes[most]),
        startup_bytes=measured.startup_bytes,
        idle_bytes_per_s=round(measured.idle_bytes_per_s),
        measured_cpu_s=round(measured.cpu_s, 4),
    )


def say(row: Row) -> None:
    """One line of the table on standard output."""
    share = row.measured_step_s / row.predicted_step_s if row.predicted_step_s else float("nan")
    print(
        f"{row.plan:9} {row.sites} x {row.devices_per_site} at {row.link_mbit_per_s:g} Mbit/s: "
        f"{row.measured_wire_bytes:,} bytes of {row.predicted_wire_bytes:,} and {row.gloo_header_bytes:,} of "
        f"headers (sites off {row.site_error:.2%} at most), loopback {row.measured_loopback_bytes:,} of "
        f"{row.predicted_loopback_bytes:,}; {row.measured_step_s:.3f} s of {row.predicted_step_s:.3f} "
        f"({share:.2f}), {row.measured_cpu_s:.2f} s of cores; start-up {row.startup_bytes:,}, idle "
        f"{row.idle_bytes_per_s:,}/s",
        flush=True,
    )


def main(argv: Sequence[str]) -> None:
    """Run the table."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        check_privileges()
        for rate in map(float, _RATES.value if _BULK.value else ()):
            say_bulk(rate)
        rows = []
        for row in run_lab():
            say(row)
            rows.append(row)
            if _CSV.value:
                write_csv(Path(_CSV.value), rows)
    except ShardlabError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """The table so far."""
    names = [field.name for field in fields(Row)]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows([getattr(row, name) for name in names] for row in rows)


if __name__ == "__main__":
    app.run(main)
