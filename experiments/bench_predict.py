"""How long the prediction of one saved program takes, stage by stage, in processor seconds.

shardlab explain meshes/h100x512-fsdp64-tensor8.toml --model llama3-70b --save step.program
python experiments/bench_predict.py --program=step.program --on=h100:64x8
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from absl import app, flags

from shardlab import program as programs
from shardlab.analysis import attribute
from shardlab.cost.instructions import step_cost
from shardlab.hardware.catalog import load_machine
from shardlab.prediction import predict

PROGRAM = flags.DEFINE_string("program", None, "A saved program.", required=True)
ON = flags.DEFINE_string("on", None, "The machine.", required=True)
T = TypeVar("T")


def timed(what: str, run: Callable[[], T]) -> T:
    """What `run` gives; prints how long it took."""
    wall_s, used_s = time.perf_counter(), time.process_time()
    found = run()
    wall_s, used_s = time.perf_counter() - wall_s, time.process_time() - used_s
    print(f"{what}: {used_s:.2f} s of processor time, {wall_s:.2f} s")
    return found


def main(argv: Sequence[str]) -> None:
    """Read, analyse, price, predict."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    program, machine = programs.load(Path(PROGRAM.value)), load_machine(ON.value)
    (part,) = timed("read and attributed", lambda: tuple(attribute(program, machine=machine)))
    cost = timed("priced", lambda: step_cost(part.module, program.backend))
    predicted = timed("predicted, with the timeline", lambda: predict(part, cost, machine))
    if predicted is not None:
        print(f"step: {predicted.timeline.step_time_s} s, {predicted.error_class}")


if __name__ == "__main__":
    app.run(main)
