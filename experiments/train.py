"""Train a real model on real text with any plan whose machine is emulated or attached.

python experiments/train.py --mesh=meshes/cpu8-fsdp.toml --steps=200 --metrics=loss.csv

The same program is one process or one of many: with --coordinator, --process_id and --num_processes, or where
Slurm, Kubernetes or Cloud TPU started it (`launch_local.py` starts several on one machine). The default text
is the Python standard library's own source, read as bytes. Progress goes to standard error, metrics to a CSV
file (and to TensorBoard where tensorboardX is installed). At the end standard output says what the step that
ran moved between devices, read from its compiled program. Process 0 alone reports.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import app, flags
from checkpoints import open_checkpoints, share_memory_pools
from metrics import Record, Report, open_reports
from processes import (
    ASKED_TO_LEAVE,
    Processes,
    asked_for,
    asked_to_leave,
    join,
    leave,
    let_gloo_wait_its_turn,
    made_by_all,
)
from windows import Windows, read_text, windows_of_steps

from shardlab.errors import Problem, ShardlabError, UserError
from shardlab.spec.case import Case, make_case
from shardlab.spec.plan import load_plan
from shardlab.units import format_bytes

if TYPE_CHECKING:
    from shardlab.analysis import ByteRange
    from shardlab.parallel.step import Batch, Step

MESH = flags.DEFINE_string("mesh", None, "Mesh file (TOML).", required=True)
ON = flags.DEFINE_string("on", None, "Machine, cpu:N or attached:N; the plan's own unless said.")
MODEL = flags.DEFINE_string("model", "tiny", "Named model configuration with a vocabulary of at least 256.")
TEXT = flags.DEFINE_string("text", None, "Text file, or folder of .py and .txt files; read as bytes.")
MAX_TEXT_MB = flags.DEFINE_float("max_text_mb", 8.0, "How much text to read, in megabytes.", lower_bound=0.01)
STEPS = flags.DEFINE_integer("steps", 200, "Optimizer steps.", lower_bound=1)
BATCH = flags.DEFINE_integer("batch", 16, "Global batch in sequences.", lower_bound=1)
SEQ = flags.DEFINE_integer("seq", 128, "Tokens (bytes) per sequence.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Seeds the parameters and the choice of batches.", lower_bound=0)
LEARNING_RATE = flags.DEFINE_float("learning_rate", 1e-3, "Peak of the schedule.", lower_bound=0.0)
DTYPE = flags.DEFINE_enum(
    "compute_dtype", None, ["float32", "bfloat16"], "Of activations; float32 when emulated, else bfloat16."
)
METRICS = flags.DEFINE_string("metrics", None, "CSV file to write: step, loss, gradient_norm, tokens_per_s.")
TENSORBOARD = flags.DEFINE_string("tensorboard", None, "Folder for TensorBoard event files.")
CHECKPOINTS = flags.DEFINE_string("checkpoints", None, "Folder to keep checkpoints in, and to go on from.")
CHECKPOINT_EVERY = flags.DEFINE_integer("checkpoint_every", 100, "Steps between them.", lower_bound=1)
COMPILED = flags.DEFINE_string("compile_cache", None, "Folder of compiled programs, for quicker restarts.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, when there are several.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of the processes this is, from 0.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes train together.")
REPORT_EVERY = flags.DEFINE_integer("report_every", 10, "Steps between lines of progress.", lower_bound=1)

BYTE_VALUES = 256


def case_from_flags() -> Case:
    """The case that the flags describe. Raises UserError or Infeasible."""
    case = make_case(load_plan(MESH.value), MODEL.value, ON.value, BATCH.value, SEQ.value)
    machine = case.load_machine()
    if machine.family not in ("cpu", "attached"):
        what = f"{case.machine} is neither CPUs nor attached"
        fix = f"add --on=cpu:{machine.num_devices} or --on=attached:{machine.num_devices}"
        raise UserError(Problem(MESH.value, what, fix))
    if case.model.vocab < BYTE_VALUES:
        what = f"{case.model.name} has {case.model.vocab} tokens, fewer than the {BYTE_VALUES} bytes"
        raise UserError(Problem("--model", what, "use a larger vocabulary"))
    return case


def prepare_environment(case: Case, processes: Processes | None) -> None:
    """Set the plan's compiler flags and the number of devices, which jax reads when it is imported, and join
    the other processes."""
    from shardlab.compile.environment import child_environment, split_flags

    machine = case.load_machine()
    kept, withheld = split_flags(case.plan.flags, machine.family)
    for flag, why in withheld:
        sys.stderr.write(f"not passed on: {flag} ({why})\n")
    environment = child_environment(machine, kept, os.environ)
    on_cpu = machine.family == "cpu"
    if processes is not None and on_cpu:  # this process has a part of the devices
        environment["XLA_FLAGS"] = " ".join(kept)
    if COMPILED.value is not None:
        environment["JAX_COMPILATION_CACHE_DIR"] = str(Path(COMPILED.value).absolute())
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ.clear()
    os.environ.update(environment)
    if CHECKPOINTS.value is not None:
        share_memory_pools()
    if processes is not None:
        join(processes, emulated_devices=machine.num_devices if on_cpu else None)


def build(case: Case) -> tuple[Callable[[], Any], Step, Any]:
    """(what makes the initial state, step, compiled step) on all devices."""
    import jax
    import jax.numpy as jnp

    from shardlab.compile.mesh import fill_mesh
    from shardlab.compile.target import open_target
    from shardlab.parallel.optimizer import OptimizerConfig
    from shardlab.parallel.step import build_step, init_state

    machine = case.load_machine()
    if machine.family == "cpu" and jax.distributed.is_initialized():
        let_gloo_wait_its_turn()
    target = open_target(machine)
    mesh, _, notes = fill_mesh(case.plan.axes, case.plan.order, target)
    dtype = jnp.dtype(DTYPE.value or ("float32" if machine.emulated else "bfloat16"))
    optimizer = OptimizerConfig(
        peak_learning_rate=LEARNING_RATE.value,
        warmup_steps=min(20, STEPS.value),
        total_steps=max(STEPS.value, 21),
    )
    step = build_step(case, mesh, target=target.family, compute_dtype=dtype, optimizer=optimizer)
    for note in (*notes, *case.notes(), *step.notes):
        sys.stderr.write(f"note: {note}\n")
    lowered = step.function.lower(*step.arguments)
    # With --compile_cache process 0 compiles, and the others take what it kept.
    compiled = made_by_all(lowered.compile, first_alone=COMPILED.value is not None)
    return lambda: init_state(case, mesh, SEED.value, optimizer=optimizer), step, compiled


def train(case: Case, text: np.ndarray, reports: Callable[[int], AbstractContextManager[Report]]) -> Any:
    """Run to --steps, from the newest checkpoint where there is one, and return the compiled step.

    reports: what opens the metrics, given the first step that is run.
    """
    initial, step, compiled = build(case)
    facts = {"model": case.model.name, "batch": case.batch, "seq": case.seq, "seed": SEED.value,
             "steps": STEPS.value, "learning_rate": LEARNING_RATE.value}  # fmt: skip
    with open_checkpoints(CHECKPOINTS.value, CHECKPOINT_EVERY.value, facts) as checkpoints:
        found = checkpoints.restore(step.arguments[0]) if checkpoints is not None else None
        done, state = found if found is not None else (0, initial())
        if done:
            sys.stderr.write(f"goes on after step {done} of {CHECKPOINTS.value}\n")
        batches = placed_batches(case, Windows(text, case.seq), step.arguments[1], done + 1)
        number, leave_now = done, False
        with reports(done + 1) as report, asked_to_leave() as leaving:
            started_s = time.perf_counter()
            for number, batch in zip(range(done + 1, STEPS.value + 1), batches, strict=False):
                state, metrics = compiled(state, batch)
                loss, gradient_norm = float(metrics.loss), float(metrics.gradient_norm)
                now_s = time.perf_counter()
                tokens_per_s = case.batch * case.seq / (now_s - started_s)
                started_s = now_s
                report(Record(step=number, loss=loss, gradient_norm=gradient_norm, tokens_per_s=tokens_per_s))
                leave_now = leaving(number)
                if checkpoints is not None:
                    checkpoints.save(number, state, now=leave_now)
                if leave_now:
                    break
    if leave_now and number < STEPS.value:
        kept = (
            f"saved in {CHECKPOINTS.value}" if CHECKPOINTS.value else "nothing is kept without --checkpoints"
        )
        sys.stderr.write(f"asked to end (SIGTERM): stops after step {number}, {kept}\n")
        sys.exit(ASKED_TO_LEAVE)
    return compiled


def placed_batches(case: Case, windows: Windows, abstract: Batch, first_step: int = 1) -> Iterator[Batch]:
    """The batch of each step from `first_step` on, on the mesh; a process reads the rows that it holds."""
    import jax

    from shardlab.parallel.context import in_step_order

    shape, sharding = abstract.tokens.shape, abstract.tokens.sharding
    held = {row for index in sharding.addressable_devices_indices_map(shape).values()
            for row in range(*index[0].indices(case.batch))}  # fmt: skip
    rows = sorted(held)

    def place(rows_RxL: np.ndarray) -> jax.Array:
        ordered_RxL = in_step_order(rows_RxL, case.plan)

        def piece(index: tuple[slice, ...]) -> np.ndarray:
            wanted = range(*index[0].indices(case.batch))
            return ordered_RxL[np.searchsorted(rows, wanted), index[1]]

        return jax.make_array_from_callback(shape, sharding, piece)

    for window_RxL1 in windows_of_steps(
        windows, batch=case.batch, seed=SEED.value, rows=rows, first_step=first_step
    ):
        yield type(abstract)(place(window_RxL1[:, :-1]), place(window_RxL1[:, 1:]))


def say_what_moved(compiled: Any, case: Case) -> None:
    """Predicted bytes of the step that ran, per device, from its compiled program."""
    from shardlab.analysis import analyze

    analysis = analyze(compiled.as_text(), axes=case.plan.axes)
    print(f"wire bytes per device and step on {case.machine}: {shown(analysis.totals.wire_bytes)}")
    for axes, figures in sorted(analysis.totals.by_axes.items()):
        print(f"  {axes or 'no axis'}: {shown(figures['wire_bytes'])}")
    for entry in analysis.ledger:
        print(f"  not counted: {entry.what} {entry.name}: {entry.why}")


def shown(byte_range: ByteRange) -> str:
    """Exact bytes and a rounded figure: `1,234,567 (1.23 MB)`; a range where it is one."""
    low, high = byte_range
    figures = [exact(low)] if low == high else [exact(low), "unknown" if high is None else exact(high)]
    return f"{' to '.join(figures)} ({format_bytes(byte_range)})"


def exact(size_bytes: Fraction) -> str:
    """Whole bytes as they are; a fraction as a fraction."""
    return f"{int(size_bytes):,}" if size_bytes.denominator == 1 else str(size_bytes)


def main(argv: Sequence[str]) -> None:
    """Train, then say what the step moved."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    processes = None
    try:
        processes = asked_for(COORDINATOR.value, PROCESS_ID.value, NUM_PROCESSES.value, os.environ)
        case = case_from_flags()
        text = read_text(TEXT.value, int(MAX_TEXT_MB.value * 1e6))
        prepare_environment(case, processes)
        run(case, text)
    except ShardlabError as error:
        sys.stderr.write(f"{error}\n")
        if processes is not None:
            leave(error.exit_code)
        sys.exit(error.exit_code)


def run(case: Case, text: np.ndarray) -> None:
    """Train on the devices that are there; process 0 reports. Without a peer it ends, and says so."""
    import jax

    try:
        compiled = train(case, text, reports_here)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        reason = str(error).partition("\n")[0]
        sys.stderr.write(f"process {jax.process_index()}: lost another process or its link: {reason}\n")
        leave(1)
    if not jax.process_index():
        say_what_moved(compiled, case)


def reports_here(first_step: int) -> AbstractContextManager[Report]:
    """The metrics of process 0; the others have none."""
    import jax

    if jax.process_index():
        return nullcontext(lambda record: None)
    return open_reports(
        steps=STEPS.value,
        every=REPORT_EVERY.value,
        first_step=first_step,
        metrics=METRICS.value,
        tensorboard=TENSORBOARD.value,
    )


if __name__ == "__main__":
    app.run(main)
