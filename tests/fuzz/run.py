"""Fuzz `shardlab.analyze`: every input gives an Analysis, or an error that a user can act on. Nothing else.

    python tests/fuzz/run.py --inputs 1000000 --jobs 2 --seed 1

An input that breaks this is written to tests/golden/actual/ and the run exits 1. Input i of a seed is the
same in every run, on every machine: `--seed S --first I --inputs 1` repeats it.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import random
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mutate import GOLDEN, mutate, seeds

import shardlab
from shardlab.analysis.document import analysis_to_json
from shardlab.errors import ParseError, UserError

MAX_SECONDS = 5.0
"""Processor time for one input of at most 60 kB; they take about a millisecond."""
MAX_MEMORY_BYTES = 4 << 30
CHUNK = 500
_MESHES: tuple[Mapping[str, int] | None, ...] = (
    None, None, {"data": 2, "model": 4}, {"data": 4, "fsdp": 1, "model": 4}, {"a": 2, "b": 2, "c": 2},
    {"slice": 2, "data": 2, "model": 2}, {"x": 3},
)  # fmt: skip


class TooSlow(BaseException):
    """Not an Exception: no handler of the code under test may swallow it."""


def outcome(data: str | bytes, axes: Mapping[str, int] | None) -> str:
    """What analysing `data` came to: analysis, ParseError or UserError. Anything else raises."""
    try:
        analysis_to_json(shardlab.analyze(data, axes))
    except UserError as error:
        assert error.problems, "a UserError that says nothing"
        return "UserError"
    except ParseError as error:
        if isinstance(data, str) or error.line:
            assert error.line >= 1, f"no line: {error}"
            assert error.column >= 1, f"no column: {error}"
        return "ParseError"
    return "analysis"


def _too_slow(signum: int, frame: object) -> None:
    raise TooSlow(f"more than {MAX_SECONDS} s")


def nth_input(
    seed: int, index: int, originals: Sequence[bytes]
) -> tuple[str | bytes, Mapping[str, int] | None]:
    """Input `index` of `seed`, as text where it is text, and the axes to read it with."""
    chosen = random.Random(f"{seed}:{index}")
    data = mutate(chosen, originals)
    axes = chosen.choice(_MESHES)
    if b"HloModule" in data[:200] and b"\n" in data and chosen.random() < 0.9:
        return data.decode("utf-8", "replace"), axes
    return data, axes


def run_chunk(task: tuple[int, int, int]) -> tuple[Counter[str], list[str]]:
    """Run inputs [first, last) of a seed: how often each outcome came, and what each failure was."""
    seed, first, last = task
    originals = seeds()
    counts: Counter[str] = Counter()
    failures = []
    for index in range(first, last):
        data, axes = nth_input(seed, index, originals)
        signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
        try:
            counts[outcome(data, axes)] += 1
        except (Exception, TooSlow):
            signal.setitimer(signal.ITIMER_PROF, 0)
            counts["failure"] += 1
            kept = _keep(data)
            failures.append(f"--seed {seed} --first {index} axes {axes} {kept}\n{traceback.format_exc(-12)}")
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    return counts, failures


def _keep(data: str | bytes) -> Path:
    raw = data.encode() if isinstance(data, str) else data
    kept = GOLDEN / "actual" / f"fuzz-{hashlib.sha256(raw).hexdigest()[:16]}"
    kept.parent.mkdir(exist_ok=True)
    kept.write_bytes(raw)
    return kept


def _prepare() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    signal.signal(signal.SIGPROF, _too_slow)


def _tasks(seed: int, first: int, inputs: int | None, stop_at: float) -> Iterator[tuple[int, int, int]]:
    last = first + inputs if inputs is not None else sys.maxsize
    while first < last and time.monotonic() < stop_at:
        yield seed, first, min(first + CHUNK, last)
        first += CHUNK


def fuzz(
    seed: int, first: int, inputs: int | None, seconds: float, jobs: int
) -> tuple[Counter[str], list[str]]:
    """Run inputs from `first` on until their number or the time is used up."""
    counts: Counter[str] = Counter()
    failures: list[str] = []
    stop_at = time.monotonic() + seconds
    tasks = _tasks(seed, first, inputs, stop_at)
    with multiprocessing.get_context("spawn").Pool(jobs, _prepare) as pool:
        while batch := [task for _, task in zip(range(jobs), tasks, strict=False)]:
            for found, failed in pool.imap_unordered(run_chunk, batch):
                counts += found
                failures += failed
                for failure in failed:
                    print(failure, flush=True)
    return counts, failures


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, help="how many; without it, until --seconds are over")
    parser.add_argument("--seconds", type=float, help="stop starting new inputs after this long")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--seed", type=int, default=0, help="which stream of inputs")
    parser.add_argument("--first", type=int, default=0, help="which input of the stream is the first")
    flags = parser.parse_args(arguments)
    if flags.inputs is None and flags.seconds is None:
        parser.error("give --inputs or --seconds")
    seconds = flags.seconds if flags.seconds is not None else float("inf")
    started = time.monotonic()
    counts, failures = fuzz(flags.seed, flags.first, flags.inputs, seconds, flags.jobs)
    outcomes = ", ".join(f"{number} {kind}" for kind, number in sorted(counts.items()))
    print(f"{counts.total()} inputs in {time.monotonic() - started:.0f} s of seed {flags.seed}: {outcomes}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
