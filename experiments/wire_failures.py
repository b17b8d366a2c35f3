"""Failures in the wire lab: a straggler, a link that drops, a site that dies, and what training does then.

sudo python experiments/wire_failures.py --plan=data --rate=50

straggler: one site's link at a tenth of the rate; the prediction is that of links which are all that slow,
since a ring waits for its slowest; it takes longer by what queues in front of that link, where
acknowledgements wait behind data. link: down for --down_seconds in the middle of a step; TCP sends again,
and the losses are those of an undisturbed run. site: its process is killed; the others end with a message.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median

from absl import app, flags
from sites import Sites
from wire_lab import machine_file, predict
from wire_measure import read_rows, start, wait
from wire_plans import PLANS

from shardlab.compile import compile_case
from shardlab.errors import Problem, ShardlabError, UserError
from shardlab.hardware.catalog import load_machine
from shardlab.spec.case import Case, make_case
from shardlab.spec.plan import load_plan

_PLAN = flags.DEFINE_enum("plan", "data", list(PLANS), "Plan, over two sites.")
_RATE = flags.DEFINE_float("rate", 50, "Mbit/s of each link.", lower_bound=1)
_DOWN = flags.DEFINE_float("down_seconds", 4, "How long the link is down.", lower_bound=0)
_STEPS = flags.DEFINE_integer("steps", 6, "Of each run.", lower_bound=4)
_AT = 3  # the step after which it happens
_TIMEOUT_S = 300


def losses_and_steps(folder: Path, site: int = 0) -> tuple[list[float], list[float]]:
    """Losses by step, and seconds of each step after the first."""
    rows = [row for row in read_rows(folder, site) if row["step"] > 0]
    return [row["loss"] for row in rows], [b["time_s"] - a["time_s"] for a, b in pairwise(rows)]


def wait_for_step(folder: Path, step: int) -> None:
    """Until site 0 has done this step."""
    deadline_s = time.monotonic() + _TIMEOUT_S
    while not any(row["step"] == step for row in read_rows(folder, 0)):
        if time.monotonic() > deadline_s:
            raise UserError(Problem("site 0", f"no step {step} within {_TIMEOUT_S} s", "see its output"))
        time.sleep(0.02)


def straggler(folder: Path, mesh: Path, case: Case) -> list[float]:
    """One link at a tenth. Returns the losses."""
    slow = f"{machine_file(folder, _RATE.value / 10)}:2x1"
    program = compile_case(case)
    said = [predict(case, program, load_machine(on)).step_s for on in (case.machine, slow)]
    with Sites(2, _RATE.value) as sites:
        sites.shape(1, _RATE.value / 10)
        wait(start(sites, folder, mesh, case, _STEPS.value), folder)
    losses, steps_s = losses_and_steps(folder)
    print(
        f"straggler: {median(steps_s):.2f} s a step; predicted {said[1]:.2f} with every link at "
        f"{_RATE.value / 10:g} Mbit/s, {said[0]:.2f} at {_RATE.value:g}",
        flush=True,
    )
    return losses


def undisturbed(folder: Path, mesh: Path, case: Case) -> list[float]:
    """Returns the losses."""
    with Sites(2, _RATE.value) as sites:
        wait(start(sites, folder, mesh, case, _STEPS.value), folder)
    losses, steps_s = losses_and_steps(folder)
    print(f"undisturbed: {median(steps_s):.2f} s a step", flush=True)
    return losses


def dropped_link(folder: Path, mesh: Path, case: Case) -> list[float]:
    """The link of site 1 is down for a while. Returns the losses."""
    with Sites(2, _RATE.value) as sites:
        processes = start(sites, folder, mesh, case, _STEPS.value)
        wait_for_step(folder, _AT)
        sites.cut(1)
        time.sleep(_DOWN.value)
        sites.mend(1)
        wait(processes, folder)
    losses, steps_s = losses_and_steps(folder)
    print(
        f"link down for {_DOWN.value:g} s: the longest step took {max(steps_s):.2f} s, the others "
        f"{median(steps_s):.2f}",
        flush=True,
    )
    return losses


def dead_site(folder: Path, mesh: Path, case: Case) -> None:
    """The process of site 1 is killed."""
    with Sites(2, _RATE.value) as sites:
        processes = start(sites, folder, mesh, case, 10_000)
        wait_for_step(folder, _AT)
        sites.kill(1)
        started_s = time.monotonic()
        try:
            code = processes[0].wait(_TIMEOUT_S)
        finally:
            took_s = time.monotonic() - started_s
    said = (folder / "site0.log").read_text().strip().splitlines()[-1]
    print(
        f"site killed: the other ended {took_s:.1f} s later with exit code {code}: {said[:160]}", flush=True
    )


def main(argv: Sequence[str]) -> None:
    """All of them, one after the other."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    try:
        with tempfile.TemporaryDirectory(prefix="shardlab-wire-") as name:
            folder = Path(name)
            mesh, made = folder / "plan.toml", PLANS[_PLAN.value]
            mesh.write_text(made.text(2, quick=True))
            on = f"{machine_file(folder, _RATE.value)}:2x1"
            case = make_case(load_plan(mesh), made.model, on, made.batch, made.seq)
            expected = undisturbed(folder, mesh, case)
            for run in (straggler, dropped_link):
                if run(folder, mesh, case) != expected:
                    raise UserError(Problem(run.__name__, "other losses than undisturbed", "a bug"))
            print("losses: the same, to the bit, in all three")
            dead_site(folder, mesh, case)
    except ShardlabError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    app.run(main)
