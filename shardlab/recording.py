"""What `shardlab record` left in a folder, as the step that was recorded: a Program and those beside it.

A process wrote `recording-HOST-PID.json` (`shardlab.recording/1`): its programs in the order in which they
first ran, each with its HLO `file`, `runs`, `num_devices`, `mesh` (axes and device ids) and `memory`; how
often those on one device ran; its place among the processes of a job. `record.py` writes it.

A program that ran k times in each of N steps runs k times per step. What does not come out even is rounded,
and what rounds to nothing is no part of the step; both are said, on the ledger.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from shardlab.errors import Problem, UserError
from shardlab.program import Flags, Memory, Program

SCHEMA = "shardlab.recording/1"
MAX_MANIFEST_BYTES = 1 << 26
_FILE = re.compile(r"[0-9a-f]{16}\.hlo")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """A program that a process ran: the program, the file with its HLO, and how often it ran."""

    program: Program
    file: str
    runs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """What one process ran on several devices, in order; what runs on one sends nothing.

    index, count: its place in a job of several processes. finished: False when it was killed, its counts then
    at most a second old.
    """

    name: str
    ran: tuple[Ran, ...]
    index: int
    count: int
    finished: bool
    problems: tuple[str, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Runs by file."""
        return {one.file: one.runs for one in self.ran}


def is_recording(folder: Path) -> bool:
    """Whether a folder holds a recording."""
    return next(folder.glob("recording-*.json"), None) is not None


def read_recording(folder: str | Path, steps: int | None = None) -> Program:
    """The step that was recorded. steps: how many there were; else as many as the program that ran most.

    Raises UserError when nothing was recorded, or the folder holds something else.
    """
    folder = Path(folder)
    paths = sorted(folder.glob("recording-*.json"))
    processes = [_process(path) for path in paths]
    if not any(process.ran for process in processes):
        raise UserError(Problem(str(folder), _nothing(processes), "run it on several devices, under record"))
    chosen, others = _chosen(processes)
    left_out = [*_about(chosen), *(entry for other in others for entry in _other(chosen, other))]
    number = steps or max(one.runs for one in chosen.ran)
    step = []
    for one in chosen.ran:
        times = (2 * one.runs + number) // (2 * number)
        if one.runs != times * number:
            left_out.append((one.program.name, _uneven(one, times, number, None if steps else chosen)))
        if times:
            step.append(replace(one.program, runs_per_step=times, hlo_text=_text(folder / one.file)))
    if not step:
        most = max(one.runs for one in chosen.ran)
        what = f"no program ran in every one of {number} steps, the most often {most} times"
        raise UserError(Problem("--steps", what, "give the number of steps that ran"))
    return replace(step[0], then=tuple(step[1:]), left_out=tuple(left_out))


def _chosen(processes: Sequence[Process]) -> tuple[Process, list[Process]]:
    """The process that speaks for the step: the first of the largest job, else the one that ran most."""
    ran = [process for process in processes if process.ran]
    chosen = max(ran, key=lambda one: (one.count, -one.index, sum(one.counts.values())))
    return chosen, [one for one in processes if one is not chosen]


def _about(process: Process) -> Iterator[tuple[str, str]]:
    yield from ((process.name, problem) for problem in process.problems)
    if not process.finished:
        yield process.name, "it was killed: its counts may be a second old"


def _other(chosen: Process, other: Process) -> Iterator[tuple[str, str]]:
    """What another process did beside the one that counts: in a job, all should do the same."""
    if other.count == chosen.count > 1:
        if other.counts != chosen.counts:
            what = f"process {other.index} did not run what process {chosen.index} ran, as often"
            yield other.name, f"{what}: its programs are not counted"
    elif other.ran:
        runs = sum(other.counts.values())
        yield other.name, f"another process, which ran {len(other.ran)} programs {runs} times: not counted"
    yield from ((other.name, problem) for problem in other.problems)


def _uneven(one: Ran, times: int, steps: int, guessed_for: Process | None) -> str:
    counted = f"counted as {times} per step" if times else "not counted"
    often = "once" if one.runs == 1 else f"{one.runs} times"
    why = f"it ran {often} in {steps} steps: {counted}"
    if guessed_for is None or one.runs < 2 or steps % one.runs:
        return why
    several = ", ".join(
        f"{other.runs // one.runs} × {other.program.name}"
        for other in guessed_for.ran
        if other.runs and other.runs % one.runs == 0
    )
    return f"{why} (--steps {one.runs} if a step is {several})"


def _nothing(processes: Sequence[Process]) -> str:
    problems = [problem for process in processes for problem in process.problems]
    if problems:
        return problems[0]
    return "nothing ran on several devices" if processes else "nothing was recorded"


def _process(path: Path) -> Process:
    try:
        with path.open("rb") as file:
            document = json.loads(file.read(MAX_MANIFEST_BYTES))
        if document["schema"] != SCHEMA:
            raise ValueError(f"its schema is {str(document['schema'])[:60]!r}, not {SCHEMA!r}")
        return Process(
            name=path.stem,
            ran=tuple(_ran(one, document) for one in document["programs"]),
            index=int(document.get("process_index", 0)),
            count=int(document.get("process_count", 1)),
            finished=bool(document["finished"]),
            problems=tuple(map(str, document["problems"])),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(Problem(str(path), f"not a recording ({error})", "record it again")) from None


def _ran(one: Mapping[str, Any], document: Mapping[str, Any]) -> Ran:
    file = str(one["file"])
    if not _FILE.fullmatch(file):
        raise ValueError(f"{file[:60]!r} is not called after its content")
    devices = _count(one["num_devices"])
    axes, device_ids = _mesh(one.get("mesh"), devices)
    memory = {f.name: one["memory"].get(f.name) for f in fields(Memory)}
    flags = tuple(str(document.get("xla_flags", "")).split())
    program = Program(
        name=str(one["name"]),
        backend=str(document["backend"]),
        hlo_text="",
        num_devices=devices,
        mesh=axes,
        device_ids=device_ids,
        memory=Memory(**memory) if one["memory"] else None,
        versions={str(name): str(version) for name, version in document["versions"].items()},
        flags=Flags(requested=flags, effective=flags),
        autotuned=True if document["backend"] == "gpu" else None,
    )
    return Ran(program=program, file=file, runs=_count(one["runs"]))


def _mesh(mesh: Any, devices: int) -> tuple[dict[str, int] | None, tuple[int, ...] | None]:
    """Axes, and the device at each position where ids count the machine's devices."""
    if mesh is None:
        return None, None
    ids = tuple(map(_count, mesh["device_ids"]))
    axes = {str(name): _count(size) for name, size in mesh["axes"].items()}
    return axes, ids if sorted(ids) == list(range(devices)) else None


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{str(value)[:40]!r} is not a count")
    return value


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(Problem(str(path), error.strerror or str(error), "record it again")) from None
