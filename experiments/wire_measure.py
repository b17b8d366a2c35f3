"""Runs a case in the wire lab, one process of `train.py` per site, and reads what interfaces counted.

The processes wait between blocks of steps, so that one start serves every run of a row. It does not serve
other rates: a connection keeps how many segments it hands to the interface at once (`sites.py`).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
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
_MANY = 1_000_000  # steps: as many as all blocks take


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


class Running:
    """The processes of a case, one in each site. They end with the sites."""

    def __init__(
        self, sites: Sites, folder: Path, mesh: Path, case: Case, compiled: Path | None = None
    ) -> None:
        """They keep what they compile in `compiled`."""
        self._folder = folder
        self._processes = start(sites, folder, mesh, case, _MANY, compiled, blocks=True)
        self._read = 2  # rows: before anything is joined, and before the first step
        self._wait(self._read)

    def block(self, warm: int, steps: int) -> Measured:
        """So many steps, of which those after `warm` count.

        Raises UserError when a process fails or does not get there.
        """
        for process in self._processes:
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # it has ended: `wait` says of what
                process.stdin.write(f"{warm + steps}\n")
                process.stdin.flush()
        start, self._read = self._read, self._read + warm + steps + 2
        self._wait(self._read)
        rows = [read_rows(self._folder, site) for site in range(len(self._processes))]
        startup_bytes = max(payload(one[0], one[1], "eth0") for one in rows)
        return read_measured([one[start : self._read] for one in rows], warm, startup_bytes)

    def _wait(self, rows: int) -> None:
        files = [self._folder / f"site{site}.jsonl" for site in range(len(self._processes))]
        wait(
            self._processes,
            self._folder,
            lambda: all(file.exists() and file.read_bytes().count(b"\n") >= rows for file in files),
        )


def start(
    sites: Sites,
    folder: Path,
    mesh: Path,
    case: Case,
    steps: int,
    compiled: Path | None = None,
    *,
    blocks: bool = False,
) -> list[subprocess.Popen[str]]:
    """One process per site; what they count and say is in `siteN.jsonl` and `siteN.log`. blocks: they wait to
    be told how many steps to do."""
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
            f"--compile_cache={compiled or folder / 'compiled'}", f"--blocks={blocks}",
        ]  # fmt: skip
        with (folder / f"site{site}.log").open("w") as log:
            processes.append(sites.start(site, command, stdin=subprocess.PIPE, stdout=log, stderr=log))
    return processes


def read_rows(folder: Path, site: int) -> list[dict[str, Any]]:
    """What a site has counted so far."""
    path = folder / f"site{site}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def wait(
    processes: Sequence[subprocess.Popen[str]], folder: Path, there: Callable[[], bool] | None = None
) -> None:
    """Until all have ended well, or `there`. Raises UserError with the last words of the first that ended."""
    deadline_s = time.monotonic() + _TIMEOUT_S
    while not there() if there is not None else any(process.poll() is None for process in processes):
        ended = [process.poll() for process in processes]
        failed = [site for site, code in enumerate(ended) if code or (there is not None and code == 0)]
        if failed or time.monotonic() > deadline_s:
            site = failed[0] if failed else 0
            said = (folder / f"site{site}.log").read_text().strip().splitlines()[-1:]
            what = f"ended with {ended[site]}" if failed else f"no end within {_TIMEOUT_S} s"
            raise UserError(Problem(f"site {site}", f"{what}: {' '.join(said)}", "see its output"))
        time.sleep(0.1)


def read_measured(rows_of_sites: Sequence[list[dict[str, Any]]], warm: int, startup_bytes: int) -> Measured:
    """Differences of counters over the steps of a block: a reading before them, one after each, and one after
    some time in which nothing was done."""
    steps = len(rows_of_sites[0]) - 2 - warm
    out, inside, frames, durations, busy = [], [], [], [], []
    for rows in rows_of_sites:
        counted = rows[warm:-1]
        first, last = counted[0], counted[-1]
        out.append(payload(first, last, "eth0") / steps)
        inside.append(payload(first, last, "lo") / steps)
        frames.append((last["eth0"][2] - first["eth0"][2]) / steps)
        busy.append((last["cpu_s"] - first["cpu_s"]) / steps)
        durations.append(median(b["time_s"] - a["time_s"] for a, b in pairwise(counted)))
    *_, last, idle = rows_of_sites[0]
    return Measured(
        out_bytes=tuple(out),
        loopback_bytes=tuple(inside),
        frame_bytes=tuple(frames),
        step_s=max(durations),
        startup_bytes=startup_bytes,
        idle_bytes_per_s=payload(last, idle, "eth0") / (idle["time_s"] - last["time_s"]),
        cpu_s=sum(busy),
    )


def payload(first: dict[str, Any], last: dict[str, Any], interface: str) -> int:
    """TCP payload that an interface sent between two readings."""
    sent, packets = (last[interface][i] - first[interface][i] for i in (2, 3))
    return sent - HEADER_BYTES * packets
