"""Start one training run as several processes on this machine, and end all of them when one ends badly.

python experiments/launch_local.py -n 2 -- --mesh=meshes/cpu8-fsdp.toml --steps=20

What stands behind `--` goes to `train.py` (or --program). Lines on standard error carry the process that
wrote them. Emulated devices divide over the processes; --devices_per_process sets how many there are
(--on=cpu:N). SIGTERM is handed on: all save after the same step, and leave.
"""

from __future__ import annotations

import ctypes
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from absl import app, flags

PROCESSES = flags.DEFINE_integer("n", 2, "Processes.", lower_bound=1)
DEVICES = flags.DEFINE_integer("devices_per_process", None, "Emulated devices of each.", lower_bound=1)
PORT = flags.DEFINE_integer("port", None, "Of the coordinator; a free one unless said.", lower_bound=1)
PROGRAM = flags.DEFINE_string("program", "train.py", "Beside this file: what every process runs.")

GRACE_SECONDS = 5
LEAVE_SECONDS = 60  # where nothing failed: for the checkpoint that they write before they leave
_PR_SET_PDEATHSIG = 1


def command_of(index: int, count: int, port: int, arguments: Sequence[str]) -> list[str]:
    """What process `index` runs."""
    joined = [f"--coordinator=127.0.0.1:{port}", f"--process_id={index}", f"--num_processes={count}"]
    return [
        sys.executable,
        str(Path(__file__).with_name(PROGRAM.value)),
        *arguments,
        *(joined if count > 1 else []),
    ]


def die_with_parent() -> None:
    """In the child, before it runs: nothing is left behind when this launcher is killed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def forward(index: int, stream: IO[str]) -> None:
    """Copy a process's standard error, each line with the process's number."""
    for line in stream:
        sys.stderr.write(f"[{index}] {line}")


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_all(running: Sequence[subprocess.Popen[str]]) -> int:
    """The first exit code that is not 0, as soon as there is one; else 0 when all have ended."""
    while True:
        codes = [process.poll() for process in running]
        for index, code in enumerate(codes):
            if code:
                how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
                sys.stderr.write(
                    f"process {index} of {len(running)} ended: {how}; the others are ended too\n"
                )
                return code if code > 0 else 128 - code
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.05)


def end(running: Sequence[subprocess.Popen[str]], grace_s: float) -> None:
    """Ask every process that still runs to end, and make it after `grace_s`."""
    for process in running:
        if process.poll() is None:
            process.terminate()
    deadline_s = time.monotonic() + grace_s
    for process in running:
        try:
            process.wait(max(0.0, deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def launch(count: int, port: int, arguments: Sequence[str]) -> int:
    """Run all processes to their end. Returns the exit code."""
    running: list[subprocess.Popen[str]] = []
    readers = []
    grace_s = GRACE_SECONDS
    try:
        for index in range(count):
            process = subprocess.Popen(
                command_of(index, count, port, arguments),
                stderr=subprocess.PIPE,
                text=True,
                preexec_fn=die_with_parent,
            )
            running.append(process)
            assert process.stderr is not None
            readers.append(threading.Thread(target=forward, args=(index, process.stderr), daemon=True))
            readers[-1].start()
        return wait_for_all(running)
    except KeyboardInterrupt:
        return 130
    except SystemExit:  # SIGTERM, which they get too
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        grace_s = LEAVE_SECONDS
        raise
    finally:
        end(running, grace_s)
        for reader in readers:
            reader.join(GRACE_SECONDS)


def main(argv: Sequence[str]) -> None:
    """Start them, and exit as the first that fails."""
    arguments = list(argv[1:])
    if DEVICES.value is not None:
        arguments.append(f"--on=cpu:{PROCESSES.value * DEVICES.value}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(launch(PROCESSES.value, PORT.value or free_port(), arguments))


if __name__ == "__main__":
    app.run(main)
