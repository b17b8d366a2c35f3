"""One site of the wire lab: `train.py`, with the interface counters read before and after every step.

Started by `wire_lab.py`; takes train.py's flags, and --counters=FILE for what it writes: one line of JSON per
reading, step -1 before anything is joined, 0 before the first step, then every step, and `IDLE` after
--idle_seconds of doing nothing. With --blocks it does as many steps as a line of standard input says, and
waits for the next, after a reading before the first of them and an idle one after the last.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import train
from absl import app, flags
from metrics import Record, Report
from processes import asked_for, leave
from windows import read_text

from shardlab.errors import ShardlabError

IDLE = -2
COUNTERS = flags.DEFINE_string("counters", None, "File to write.", required=True)
BLOCKS = flags.DEFINE_bool("blocks", False, "Wait to be told how many steps, and again.")
IDLE_SECONDS = flags.DEFINE_float("idle_seconds", 1.0, "How long to listen to coordination after steps.")


def read_counters() -> dict[str, list[int]]:
    """Interface -> received bytes and packets, sent bytes and packets, since the namespace was made."""
    found = {}
    for line in Path("/proc/net/dev").read_text().splitlines()[2:]:
        name, _, figures = line.partition(":")
        values = [int(value) for value in figures.split()]
        found[name.strip()] = [values[0], values[1], values[8], values[9]]
    return found


def note(file: TextIO, step: int, loss: float | None = None) -> None:
    """Write a reading at once: the site may not live to the end."""
    at = {"step": step, "time_s": time.monotonic(), "cpu_s": time.process_time(), "loss": loss}
    file.write(json.dumps(at | read_counters()) + "\n")
    file.flush()


@contextmanager
def counted(file: TextIO, done: int) -> Iterator[Report]:
    """A reading now that everything is compiled and in its place, and one after every step."""
    note(file, done)
    until = await_block(file, done) if BLOCKS.value else None

    def report(record: Record) -> None:
        nonlocal until
        note(file, record.step, record.loss)
        if record.step == until:
            idle(file)
            until = await_block(file, record.step)

    yield report


def await_block(file: TextIO, done: int) -> int:
    """The last step of the next block; ends the process where there is none."""
    line = sys.stdin.readline()
    if not line.strip():
        leave(0)
    note(file, done)
    return done + int(line)


def idle(file: TextIO) -> None:
    """A reading after a while in which nothing is computed."""
    time.sleep(IDLE_SECONDS.value)
    note(file, IDLE)


def main(argv: Sequence[str]) -> None:
    """Train, and write what the interfaces counted."""
    del argv
    with Path(COUNTERS.value).open("w") as file:
        try:
            processes = asked_for(
                train.COORDINATOR.value, train.PROCESS_ID.value, train.NUM_PROCESSES.value, os.environ
            )
            case = train.case_from_flags()
            text = read_text(train.TEXT.value, int(train.MAX_TEXT_MB.value * 1e6))
            note(file, -1)
            train.prepare_environment(case, processes)
            train.train(case, text, lambda first: counted(file, first - 1))
            idle(file)
        except ShardlabError as error:
            sys.stderr.write(f"{error}\n")
            leave(error.exit_code)
        except Exception as error:  # a peer or its link is lost
            sys.stderr.write(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}\n")
            leave(1)


if __name__ == "__main__":
    app.run(main)
