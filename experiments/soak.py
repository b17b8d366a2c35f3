"""Train for long, and watch what the process holds: memory and descriptors must not grow.

python experiments/launch_local.py -n 2 --program=soak.py -- --mesh=meshes/cpu8-fsdp.toml --steps=20000

Takes train.py's flags. Of every process: resident memory and open descriptors after every tenth of the steps;
at the first, everything has run once. Exit code 1 when a later sample has more than --growth_mb or
--growth_fds above it.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import train
from absl import app, flags
from metrics import Record, Report
from processes import asked_for, leave
from windows import read_text

from shardlab.errors import ShardlabError

_GROWTH_MB = flags.DEFINE_float("growth_mb", 20.0, "How much resident memory may grow.")
_GROWTH_FDS = flags.DEFINE_integer("growth_fds", 3, "How many descriptors more there may be.")


def held() -> tuple[float, int]:
    """Resident memory in MB, open descriptors. What was freed and glibc keeps for later is given back first:
    threads that write checkpoints leave it in pools of their own."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc alone
    if trim is not None:
        trim(0)
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1e3 if found else 0.0, len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def main(argv: Sequence[str]) -> None:
    """Train and compare."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    samples: list[tuple[float, int]] = []
    every = max(train.STEPS.value // 10, 1)

    @contextmanager
    def reports(first_step: int) -> Iterator[Report]:
        with train.reports_here(first_step) as inner:

            def report(record: Record) -> None:
                inner(record)
                if record.step % every == 0 or record.step == train.STEPS.value:
                    samples.append(held())
                    said = f"{samples[-1][0]:.1f} MB, {samples[-1][1]} descriptors"
                    sys.stderr.write(f"after step {record.step}: {said}\n")

            yield report

    try:
        processes = asked_for(
            train.COORDINATOR.value, train.PROCESS_ID.value, train.NUM_PROCESSES.value, os.environ
        )
        case = train.case_from_flags()
        text = read_text(train.TEXT.value, int(train.MAX_TEXT_MB.value * 1e6))
        train.prepare_environment(case, processes)
        train.train(case, text, reports)
    except ShardlabError as error:
        sys.stderr.write(f"{error}\n")
        leave(error.exit_code)
    (memory_mb, descriptors), *later = samples
    growth_mb = max((mb for mb, _ in later), default=memory_mb) - memory_mb
    growth_fds = max((count for _, count in later), default=descriptors) - descriptors
    sys.stderr.write(f"since then at most {growth_mb:+.1f} MB, {growth_fds:+} descriptors\n")
    if growth_mb > _GROWTH_MB.value or growth_fds > _GROWTH_FDS.value:
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
