"""Programs of other sources than these: `explain` of the shardlab in a folder, in processes of its own.

Runs the code in that folder. Only its command line and its saved programs are relied on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from shardlab.errors import Problem, UserError
from shardlab.hardware.catalog import load_machine
from shardlab.lab.cache import OFF, VARIABLE
from shardlab.lab.cases import Question
from shardlab.lab.progress import Progress
from shardlab.lab.run import default_jobs
from shardlab.program import load
from shardlab.review.records import Side
from shardlab.review.sides import side_of

_COMMAND = "import sys, shardlab.cli; sys.exit(shardlab.cli.main())"
Job = tuple[str, str]  # a mesh file, relative to the folder, and a machine or "" for the plan's own
Answer = Side | UserError


def explain_all(
    folder: Path, jobs: Sequence[Job], question: Question, cache: Path | None, progress: Progress
) -> dict[Job, Answer]:
    """A side for each job, or the mistakes that `explain` named. cache: where it keeps programs."""
    with ThreadPoolExecutor(default_jobs()) as pool:
        waiting = {job: pool.submit(partial(_explain, folder, job, question, cache)) for job in jobs}
        found: dict[Job, Answer] = {}
        for job, future in waiting.items():
            found[job] = future.result()
            progress.finish(
                " on ".join(filter(None, job)), "done" if isinstance(found[job], Side) else "failed"
            )
        return found


def _explain(folder: Path, job: Job, question: Question, cache: Path | None) -> Answer:
    plan, machine = job
    with tempfile.TemporaryDirectory(prefix="shardlab-sources-") as scratch:
        saved = Path(scratch) / "step.program"
        # -P: nothing but the folder itself is first on the path.
        command = [sys.executable, "-P", "-c", _COMMAND, "explain", plan, "--json", "--save", str(saved)]
        done = subprocess.run(
            [*command, *_flags(question, machine)],
            cwd=folder,
            env=_environment(folder, cache),
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            check=False,
        )
        try:
            document = json.loads(done.stdout) if done.returncode == 0 else None
        except ValueError:
            document = None
        if not isinstance(document, dict):
            lines = done.stderr.strip().splitlines() or [f"explain exited with {done.returncode}"]
            lines = lines[-1:] if "Traceback" in done.stderr else [line for line in lines if line[:1] != "["]
            return UserError(*(_problem(folder, plan, line) for line in lines))
        return _side(folder, document, saved)


def _problem(folder: Path, plan: str, line: str) -> Problem:
    """What was said, with the whole path of the mesh file."""
    where, _, what = line.partition(": ") if line.startswith(plan) else (plan, "", line)
    return Problem(f"{folder}/{where}", what, "")


def _flags(question: Question, machine: str) -> list[str]:
    named = {
        "--on": _placed(Path.cwd(), machine) if machine else None,
        "--model": question.model,
        "--batch": question.batch,
        "--seq": question.seq,
        "--workload": question.workload,
        "--step": question.step,
    }
    return [text for flag, value in named.items() if value is not None for text in (flag, str(value))]


def _placed(folder: Path, machine: str) -> str:
    """A machine as written in a folder; the path of a machine file whole."""
    return str(folder / machine) if machine.partition(":")[0].endswith(".toml") else machine


def _environment(folder: Path, cache: Path | None) -> dict[str, str]:
    paths = (str(folder), os.environ.get("PYTHONPATH", ""))
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        VARIABLE: OFF if cache is None else str(cache),
    }


def _side(folder: Path, document: dict[str, Any], saved: Path) -> Side:
    """The program as this shardlab reads it; without one, what the document says."""
    if not saved.exists():
        return side_of(document)
    case = document["case"]
    side = side_of(load(saved), machine=load_machine(_placed(folder, case["machine"])))
    return replace(side, case=case, notes=tuple(document.get("notes", ())))
