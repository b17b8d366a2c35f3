"""Runs a case in the wire lab, one process of `train.py` per site, and reads what interfaces counted."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from sites import HEADER_BYTES, Sites

from shardlab.errors import Problem, UserError
from shardlab.spec.case import Case

_PORT = 9911
_TIMEOUT_S = 300


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


def measure(
    sites: Sites, folder: Path, mesh: Path, case: Case, *, warm: int, steps: int, compiled: Path | None = None
) -> Measured:
    """Run the case, one process per site, which keep what they compile in `compiled`.

    Raises UserError when a process fails or does not end.
    """
    processes = start(sites, folder, mesh, case, warm + steps, compiled)
    wait(processes, folder)
    return read_measured([read_rows(folder, site) for site in range(len(processes))], warm=warm, steps=steps)


def start(
    sites: Sites, folder: Path, mesh: Path, case: Case, steps: int, compiled: Path | None = None
) -> list[subprocess.Popen[str]]:
    """One process per site; what they count and say is in `siteN.jsonl` and `siteN.log`."""
    count, processes = len(sites.names), []
    for site in range(count):
        counters = folder / f"site{site}.jsonl"
        counters.unlink(missing_ok=True)
        command = [
            sys.executable, str(Path(__file__).with_name("wire_worker.py")), f"--mesh={mesh}",
            f"--on={case.machine}", f"--model={case.model.name}", f"--batch={case.batch}",
            f"--seq={case.seq}", f"--steps={steps}", f"--counters={counters}",
            f"--coordinator={sites.address(0)}:{_PORT}", f"--process_id={site}",
            f"--num_processes={count}", "--max_text_mb=0.2",
            f"--compile_cache={compiled or folder / 'compiled'}",
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
    deadline_s = time.monotonic() + _TIMEOUT_S
    while any(process.poll() is None for process in processes):
        failed = [site for site, process in enumerate(processes) if process.poll()]
        if failed or time.monotonic() > deadline_s:
            site = failed[0] if failed else 0
            said = (folder / f"site{site}.log").read_text().strip().splitlines()[-1:]
            what = f"ended with {processes[site].poll()}" if failed else f"no end within {_TIMEOUT_S} s"
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
