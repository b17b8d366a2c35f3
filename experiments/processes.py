"""One run as several processes: joining them by `jax.distributed`, and saying clearly why that failed.

The coordinator is given by flags, or found by JAX where Slurm, Kubernetes or Cloud TPU started the processes.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardlab.errors import Problem, UserError

JOIN_SECONDS = 25
ASKED_TO_LEAVE = 143  # exit code, as a shell has it of SIGTERM
_COMPILE_SECONDS = 3600
_FOUND_SECONDS = 5.0
# What each scheduler sets in the processes of a job, and how many of them there are.
_COUNTS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")


@dataclass(frozen=True, slots=True, kw_only=True)
class Processes:
    """How this process joins the others. None: what JAX finds in its cluster's environment.

    coordinator: HOST:PORT of process 0. index: 0 to count - 1.
    """

    coordinator: str | None = None
    index: int | None = None
    count: int | None = None


def asked_for(
    coordinator: str | None, index: int | None, count: int | None, environment: Mapping[str, str]
) -> Processes | None:
    """The processes that flags or a scheduler ask for; None: this one is alone. Raises UserError."""
    if coordinator is None and index is None and count is None:
        return Processes() if _started_by_scheduler(environment) else None
    if coordinator is None or index is None or count is None:
        what = "one of --coordinator, --process_id and --num_processes without the others"
        raise UserError(Problem("--coordinator", what, "give all three"))
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(Problem(f"--coordinator={coordinator}", "is not HOST:PORT", "write 10.0.0.1:9911"))
    if not 0 <= index < count:
        what = f"is not one of {count} processes"
        raise UserError(Problem(f"--process_id={index}", what, f"use 0 to {count - 1}"))
    return Processes(coordinator=coordinator, index=index, count=count) if count > 1 else None


def _started_by_scheduler(environment: Mapping[str, str]) -> bool:
    """Whether JAX's own detection finds more than one process. A lone task of a job waits for nobody."""
    for name in _COUNTS:
        if environment.get(name, "").isdecimal():
            return int(environment[name]) > 1
    indexed_job = "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment
    return indexed_job or "," in environment.get("TPU_WORKER_HOSTNAMES", "")


def join(processes: Processes, *, emulated_devices: int | None = None) -> None:
    """Join the others, before anything else of JAX runs. emulated_devices: of all processes together.

    Raises UserError when the coordinator's port is taken or the devices do not divide. A process that does
    not come ends this one with a message, since JAX itself would abort.
    """
    import jax
    from jax._src import distributed  # the count, before a backend is made

    _keep_output_clean()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if processes.coordinator is not None and processes.index == 0:
        _check_port(int(processes.coordinator.rpartition(":")[2]))
    with _deadline(processes):
        jax.distributed.initialize(
            processes.coordinator,
            processes.count,
            processes.index,
            initialization_timeout=10 * JOIN_SECONDS,
            shutdown_timeout_seconds=JOIN_SECONDS,
        )
    count = distributed.global_state.num_processes
    if emulated_devices is None:
        return
    if emulated_devices % count:
        what = f"{emulated_devices} emulated devices do not divide over {count} processes"
        raise UserError(Problem("--num_processes", what, "use a divisor"))
    jax.config.update("jax_num_cpu_devices", emulated_devices // count)


def _keep_output_clean() -> None:
    """gloo writes to standard output, which is the run's own; JAX says more than it must about joining."""
    logging.getLogger("jax").setLevel(logging.WARNING)
    sys.stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)


def _check_port(port: int) -> None:
    with socket.socket(socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            fix = "choose another --coordinator port, or end what listens there"
            raise UserError(Problem(f"port {port}", error.strerror or str(error), fix)) from None


@contextmanager
def _deadline(processes: Processes) -> Iterator[None]:
    """End this process where the others did not come in time."""
    one = "this process" if processes.index is None else f"process {processes.index} of {processes.count}"
    at = processes.coordinator or "the coordinator that its scheduler names"
    missing = "not every process came to" if processes.index == 0 else "it could not join through"

    def give_up() -> None:
        sys.stderr.write(
            f"{one}: {missing} {at} within {JOIN_SECONDS} s; start all of them with the same "
            "--coordinator and --num_processes, and check that they reach it\n"
        )
        leave(2)

    timer = threading.Timer(JOIN_SECONDS, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def let_gloo_wait_its_turn() -> None:
    """Make the backend, and let its thread for the network preempt no other (Linux; nothing elsewhere).

    gloo's, woken by what arrives, tries the lock of that connection, and tries again at once as long as
    another thread holds it (`Pair::handleEvents`, gloo/transport/tcp/pair.cc @cc441984). Where it took the
    core of the holder, that one waits for the scheduler's next tick: collectives of 0.6 ms took 4. As a batch
    thread it waits until a core is free.
    """
    import jax

    before = _threads()
    jax.devices()
    deadline_s = time.monotonic() + _FOUND_SECONDS  # on busy cores it may not have begun to wait
    while before and time.monotonic() < deadline_s:
        waiting = [thread for thread in _threads() - before if _waits_for_network(thread)]
        for thread in waiting:
            os.sched_setscheduler(thread, os.SCHED_BATCH, os.sched_param(0))
        if waiting:
            return
        time.sleep(0.01)
    if before:
        sys.stderr.write("note: gloo's thread was not found; on busy cores collectives may wait for it\n")


def _threads() -> set[int]:
    """Of this process; none where there is no /proc."""
    return {int(thread.name) for thread in Path("/proc/self/task").glob("*")}


def _waits_for_network(thread: int) -> bool:
    try:
        return "epoll" in Path(f"/proc/self/task/{thread}/wchan").read_text()
    except OSError:  # it has ended
        return False


@contextmanager
def asked_to_leave() -> Iterator[Callable[[int], bool]]:
    """What says after a step whether to save and leave: SIGTERM has come, to any of the processes.

    All of them are told at the same step. A scheduler sends it before it takes a machine away.
    """
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() > 1:  # JAX has the signal
        yield multihost_utils.reached_preemption_sync_point
        return
    came = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: came.set())
    try:
        yield lambda _: came.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)


def made_by_all(make: Callable[[], Any], *, first_alone: bool) -> Any:
    """What `make` gives, when every process has it. first_alone: the others begin after process 0.

    They wait at the coordinator, not in a collective, whose own deadline is shorter than a slow compile.
    """
    import jax
    from jax._src import distributed

    client = distributed.global_state.client
    if client is None or jax.process_count() == 1:
        return make()
    first = jax.process_index() == 0
    if first_alone and not first:
        client.wait_at_barrier("made by the first", _COMPILE_SECONDS * 1000)
    made = make()
    if first_alone and first:
        client.wait_at_barrier("made by the first", _COMPILE_SECONDS * 1000)
    client.wait_at_barrier("made by all", _COMPILE_SECONDS * 1000)
    return made


def leave(code: int) -> None:
    """End at once: JAX's own way out waits for processes that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
