"""The parent's side of a compile: start the child, read what it did or how it died. Imports no jax."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from shardlab import program as programs
from shardlab.compile.doctor import require_target
from shardlab.compile.environment import child_environment, split_flags
from shardlab.compile.interpreter import HERE, PACKAGE_PARENT, Interpreter
from shardlab.compile.key import target_key
from shardlab.compile.logs import flag_name, last_words, rejected_flags, warnings
from shardlab.compile.request import (
    KEY_FILE,
    LOWERED,
    MESSAGES_FILE,
    OUTCOME_FILE,
    PROGRAM_FILE,
    PROTO_FILE,
    Request,
)
from shardlab.compile.scheduled import dump_flags, is_scheduled, scheduled_program
from shardlab.errors import CompileFailed, Infeasible, Problem, ShardlabError, TargetMissing, UserError
from shardlab.hardware.catalog import load_machine
from shardlab.hardware.machine import Machine
from shardlab.program import Flags, Program
from shardlab.spec.step import AnyCase
from shardlab.store import Store

_MAX_LOG_CHARACTERS = 64 << 20
_LOOK_S = 0.1
_RUNNING: set[subprocess.Popen[bytes]] = set()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a child ended: its exit status (negative: the signal), whether we stopped it, and what it
    printed.
    """

    status: int
    timed_out: bool
    log: str


def compile_case(
    case: AnyCase,
    *,
    proto_to: Path | None = None,
    timeout_s: float | None = None,
    find_largest_batch: bool = True,
    store: Store | None = None,
    python: Interpreter = HERE,
    scheduled_only: bool = False,
) -> Program:
    """Compile a case ahead of time in a child process.

    proto_to: also write the optimised module there as a serialised HloModuleProto. store: where programs are
    kept by what they lower to; one that is there is not compiled again (its `compile_s` is None).
    python: of the environment whose jax compiles. scheduled_only: of a TPU program only the schedule
    (`compile/scheduled.py`), which takes a tenth of the time.

    A TPU program that does not fit comes back with `refusal` set, and with `find_largest_batch` the largest
    global batch that does compile. A flag that the compiler does not know is recorded as rejected, and the
    program compiled without it. Raises UserError, Infeasible, TargetMissing (with the install command) or
    CompileFailed; none leaves a file.
    """
    machine = load_machine(case.machine)
    if python == HERE:  # what another one lacks, its child says
        require_target(machine)
    passed, rejected = split_flags(case.plan.flags, machine.family)
    while True:
        with tempfile.TemporaryDirectory(prefix="shardlab-compile-") as name:
            folder = Path(name)
            only = ("scheduled only",) if scheduled_only and machine.family == "tpu" else ()
            request = Request(
                case=case,
                folder=folder,
                want_proto=proto_to is not None,
                find_largest_batch=find_largest_batch,
                store=store.folder if store is not None and proto_to is None else None,
                target_key=target_key(machine, (*passed, *only), python.versions(machine.family)),
                scheduled_only=bool(only),
            )
            started = time.monotonic()
            ending = run_child(request, machine, passed, timeout_s, python)
            program = _read_program(folder)
            if program is None and request.scheduled_only:
                program = scheduled_program(folder, time.monotonic() - started)
            newly_rejected = _match_rejected(passed, ending.log) if program is None else ()
            if newly_rejected:
                rejected += newly_rejected
                passed = tuple(flag for flag in passed if flag not in dict(newly_rejected))
                continue
            if program is None:
                raise _failure(case, folder, ending, timeout_s)
            if proto_to is not None and (folder / PROTO_FILE).exists():
                programs.write_atomically(proto_to, (folder / PROTO_FILE).read_bytes())
            flags = Flags(requested=case.plan.flags, effective=passed, rejected=rejected)
            program = replace(program, flags=flags, warnings=program.warnings or warnings(ending.log))
            if store is not None:
                _keep_lowered(store, folder, program)
        return program


def _keep_lowered(store: Store, folder: Path, program: Program) -> None:
    """Keep what was compiled now by what it lowers to; what the compiler refused it is asked again."""
    messages = folder / MESSAGES_FILE
    for line in messages.read_text(encoding="utf-8").splitlines() if messages.exists() else ():
        store.say(line)
    if program.compile_s is not None and program.refusal is None and (folder / KEY_FILE).exists():
        store.keep(LOWERED + (folder / KEY_FILE).read_text(encoding="ascii"), program)


def run_child(
    request: Request,
    machine: Machine,
    flags: tuple[str, ...],
    timeout_s: float | None,
    python: Interpreter = HERE,
) -> Ending:
    """Run one compile child to its end, in a session of its own; kill all of it on a time-out or an
    interrupt.
    """
    dumped = dump_flags(request.folder) if request.scheduled_only else ()
    environment = child_environment(machine, (*flags, *dumped), os.environ)
    paths = (str(PACKAGE_PARENT), environment.get("PYTHONPATH", ""))
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    # -P: a file called jax.py in the working directory must not become the jax that compiles.
    command = [python.executable, "-P", "-m", "shardlab.compile.child"]
    log_path = request.folder / "log"
    with log_path.open("wb") as log:
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        with _ended(child):
            stop = partial(is_scheduled, request.folder) if request.scheduled_only else None
            timed_out = _converse(child, request.model_dump_json().encode() + b"\n", timeout_s, stop)
    text = log_path.read_text(encoding="utf-8", errors="replace")[-_MAX_LOG_CHARACTERS:]
    return Ending(status=child.returncode, timed_out=timed_out, log=text)


def _converse(
    child: subprocess.Popen[bytes],
    line: bytes,
    timeout_s: float | None,
    stop: Callable[[], bool] | None,
) -> bool:
    """Send the request and wait; True when time ran out. Standard input stays open: it tells the child we
    live. stop: whether there is nothing more to wait for.
    """
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        child.stdin.write(line)
        child.stdin.flush()
    ends = math.inf if timeout_s is None else time.monotonic() + timeout_s
    while (left := ends - time.monotonic()) > 0:
        try:
            child.wait(min(left, _LOOK_S) if stop else timeout_s)
            return False
        except subprocess.TimeoutExpired:
            if stop is not None and stop():
                return False
    return True


def stop_children() -> None:
    """Kill every compile that this process waits for, in whichever thread; its `compile_case` then fails.

    Ctrl-C reaches only the main thread, and the children are in sessions of their own.
    """
    for child in tuple(_RUNNING):
        _kill(child)


def _kill(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)


@contextlib.contextmanager
def _ended(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """Leave no process behind: not the child, nor the assembler that it may have started."""
    _RUNNING.add(child)
    try:
        yield
    finally:
        _kill(child)
        child.wait()
        _RUNNING.discard(child)
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            child.stdin.close()


def _read_program(folder: Path) -> Program | None:
    path = folder / PROGRAM_FILE
    return programs.load(path) if path.exists() else None


def _match_rejected(passed: tuple[str, ...], log: str) -> tuple[tuple[str, str], ...]:
    """The flags as the plan wrote them, for the names that the compiler rejected."""
    reasons = dict(rejected_flags(log))
    return tuple((flag, reasons[flag_name(flag)]) for flag in passed if flag_name(flag) in reasons)


def _failure(case: AnyCase, folder: Path, ending: Ending, timeout_s: float | None) -> ShardlabError:
    what = f"{case.plan.name} on {case.machine}"
    outcome = folder / OUTCOME_FILE
    if outcome.exists():
        error = _error_of(what, json.loads(outcome.read_bytes()))
        if not isinstance(error, CompileFailed):
            return error
        return CompileFailed(what, error.why, _keep_log(folder))
    if ending.timed_out:
        why = f"stopped after {timeout_s:g} s; give it more time, or fewer layers unrolled"
    elif ending.status < 0:
        why = f"the compiler was killed by {signal_name(-ending.status)}: {last_words(ending.log)}"
    else:
        why = f"the compiler exited with {ending.status}: {last_words(ending.log)}"
    return CompileFailed(what, why, _keep_log(folder))


def signal_name(number: int) -> str:
    """`SIGKILL` for 9; the kernel's way to say that memory ran out is worth a hint."""
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    return f"{name} (out of memory on this host?)" if name == "SIGKILL" else name


def _error_of(what: str, outcome: dict[str, object]) -> ShardlabError:
    """The exception that `child.outcome_of` wrote down."""
    text = {key: str(value) for key, value in outcome.items()}
    if outcome["kind"] == "infeasible":
        return Infeasible(text["reason"], text["nearest"])
    if outcome["kind"] == "missing":
        return TargetMissing(text["target"], text["why"], text["install"])
    if outcome["kind"] == "user" and isinstance(outcome["problems"], list):
        return UserError(*(Problem(*map(str, problem)) for problem in outcome["problems"]))
    return CompileFailed(what, text["why"])


def _keep_log(folder: Path) -> str:
    """Copy the log out of the folder that is about to go, so that the error can point to it."""
    descriptor, name = tempfile.mkstemp(prefix="shardlab-compile-", suffix=".log")
    os.close(descriptor)
    shutil.copyfile(folder / "log", name)
    return name
