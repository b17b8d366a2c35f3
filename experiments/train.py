"""Train a real model on real text with any plan whose machine is emulated or attached.

python experiments/train.py --mesh=meshes/cpu8-fsdp.toml --steps=200 --metrics=loss.csv

The default text is the Python standard library's own source, read as bytes. Progress goes to standard error,
metrics
to a CSV file (and to TensorBoard where tensorboardX is installed). At the end standard output says what the
step
that ran moved between devices, read from its compiled program.
"""

from __future__ import annotations

import csv
import os
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import app, flags

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
REPORT_EVERY = flags.DEFINE_integer("report_every", 10, "Steps between lines of progress.", lower_bound=1)

BYTE_VALUES = 256
FIELDS = ("step", "loss", "gradient_norm", "tokens_per_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Metrics of one step. loss: nats per byte; tokens_per_s: over all devices, since the last report."""

    step: int
    loss: float
    gradient_norm: float
    tokens_per_s: float

    def values(self) -> tuple[float, ...]:
        """In the order of FIELDS."""
        return self.step, self.loss, self.gradient_norm, self.tokens_per_s


Report = Callable[[Record], None]


def read_text(path: str | None, max_bytes: int) -> np.ndarray:
    """Bytes to train on, uint8: of one file, of a folder's .py and .txt files in order, or of the standard
    library.

    Raises UserError when there is nothing to read.
    """
    root = Path(path) if path else Path(sysconfig.get_path("stdlib"))
    chunks, size = [], 0
    for file in text_files(root):
        chunk = file.read_bytes()[: max_bytes - size]
        chunks.append(chunk)
        size += len(chunk)
        if size >= max_bytes:
            break
    if not size:
        raise UserError(Problem(f"--text={root}", "nothing to read", "give a text file or a folder of them"))
    return np.frombuffer(b"".join(chunks), np.uint8)


def text_files(root: Path) -> Iterator[Path]:
    """The file itself, or the .py and .txt files below a folder, sorted; installed packages are left out."""
    if root.is_file():
        yield root
        return
    for file in sorted(root.rglob("*")):
        if file.suffix in (".py", ".txt") and file.is_file() and "site-packages" not in file.parts:
            yield file


def batch_at(text: np.ndarray, case: Case, seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, targets) int32 [B, L] of one step: random windows, the same for every plan."""
    windows = text.size - case.seq
    if windows < 1:
        raise UserError(Problem("--text", f"{text.size} bytes are less than --seq + 1", "give more text"))
    starts_B = np.random.default_rng((seed, step)).integers(windows, size=case.batch)
    window_BxL1 = text[starts_B[:, None] + np.arange(case.seq + 1)[None, :]].astype(np.int32)
    return window_BxL1[:, :-1], window_BxL1[:, 1:]


def case_from_flags() -> Case:
    """The case that the flags describe. Raises UserError or Infeasible."""
    case = make_case(load_plan(MESH.value), MODEL.value, ON.value, BATCH.value, SEQ.value)
    machine = case.load_machine()
    if not (machine.emulated or machine.attached):
        what = f"{case.machine} is neither emulated nor attached"
        fix = f"add --on=cpu:{machine.num_devices} or --on=attached:{machine.num_devices}"
        raise UserError(Problem(MESH.value, what, fix))
    if case.model.vocab < BYTE_VALUES:
        what = f"{case.model.name} has {case.model.vocab} tokens, fewer than the {BYTE_VALUES} bytes"
        raise UserError(Problem("--model", what, "use a larger vocabulary"))
    return case


def prepare_environment(case: Case) -> None:
    """Say how many devices to emulate, and the plan's compiler flags. jax reads this when it is imported."""
    from shardlab.compile.environment import child_environment, split_flags

    machine = case.load_machine()
    kept, withheld = split_flags(case.plan.flags, machine.family)
    for flag, why in withheld:
        sys.stderr.write(f"not passed on: {flag} ({why})\n")
    environment = child_environment(machine, kept, os.environ)
    os.environ.clear()
    os.environ.update(environment)


@contextmanager
def open_reports() -> Iterator[Report]:
    """Where metrics go: standard error, and the files that were asked for."""
    with ExitStack() as stack:
        reports: list[Report] = [print_progress]
        if METRICS.value:
            file = stack.enter_context(Path(METRICS.value).open("w", newline=""))
            writer = csv.writer(file)
            writer.writerow(FIELDS)
            reports.append(lambda record: writer.writerow(record.values()))
        if TENSORBOARD.value:
            reports.append(stack.enter_context(open_tensorboard(TENSORBOARD.value)))

        def report(record: Record) -> None:
            for one in reports:
                one(record)

        yield report


def print_progress(record: Record) -> None:
    """One line every --report_every steps."""
    if record.step % REPORT_EVERY.value == 0 or record.step == STEPS.value:
        rate = f"{record.tokens_per_s:,.0f} tokens/s"
        sys.stderr.write(f"step {record.step}/{STEPS.value}  loss {record.loss:.4f}  {rate}\n")


@contextmanager
def open_tensorboard(folder: str) -> Iterator[Report]:
    """Event files in `folder`. Raises UserError without tensorboardX."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        what = "tensorboardX is not installed"
        raise UserError(Problem("--tensorboard", what, "pip install 'shardlab[train]'")) from None
    with SummaryWriter(folder) as writer:

        def report(record: Record) -> None:
            for name, value in zip(FIELDS[1:], record.values()[1:], strict=True):
                writer.add_scalar(name, value, record.step)

        yield report


def build(case: Case) -> tuple[Any, Step, Any]:
    """(initial state, step, compiled step) on the devices of this process."""
    import jax.numpy as jnp

    from shardlab.compile.mesh import fill_mesh
    from shardlab.compile.target import open_target
    from shardlab.parallel.optimizer import OptimizerConfig
    from shardlab.parallel.step import build_step, init_state

    machine = case.load_machine()
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
    state = init_state(case, mesh, SEED.value, optimizer=optimizer)
    return state, step, step.function.lower(*step.arguments).compile()


def train(case: Case, text: np.ndarray, report: Report) -> Any:
    """Run --steps steps and return the compiled step."""
    import jax

    from shardlab.parallel.context import in_step_order

    state, step, compiled = build(case)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, step.arguments[1])
    started_s = time.perf_counter()
    for number in range(1, STEPS.value + 1):
        arrays = (in_step_order(a, case.plan) for a in batch_at(text, case, SEED.value, number))
        batch: Batch = jax.device_put(type(shardings)(*arrays), shardings)
        state, metrics = compiled(state, batch)
        loss, gradient_norm = float(metrics.loss), float(metrics.gradient_norm)
        now_s = time.perf_counter()
        tokens_per_s = case.batch * case.seq / (now_s - started_s)
        started_s = now_s
        report(Record(step=number, loss=loss, gradient_norm=gradient_norm, tokens_per_s=tokens_per_s))
    return compiled


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
    try:
        case = case_from_flags()
        prepare_environment(case)
        text = read_text(TEXT.value, int(MAX_TEXT_MB.value * 1e6))
        with open_reports() as report:
            compiled = train(case, text, report)
        say_what_moved(compiled, case)
    except ShardlabError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    app.run(main)
