"""Training as several processes: the same losses, one launcher, clear words when they do not meet."""

from __future__ import annotations

import csv
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from processes import Processes, asked_for
from windows import Windows, windows_of_steps

from shardlab.errors import UserError

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "experiments")))}

PLAN = """
on = "cpu:4"
[axes]
fsdp = 4
[params]
embed = ["fsdp"]
[activations]
batch = ["fsdp"]
[compiler]
flags = ["--xla_backend_optimization_level=0"]
"""


@pytest.mark.parametrize(
    ("flags", "environment", "expected"),
    [
        pytest.param((None, None, None), {}, None, id="alone"),
        pytest.param(
            ("h:1", 1, 2), {}, Processes(coordinator="h:1", index=1, count=2), id="flags before anything else"
        ),
        pytest.param(("h:1", 0, 1), {"SLURM_NTASKS": "4"}, None, id="one of one waits for nobody"),
        pytest.param((None, None, None), {"SLURM_NTASKS": "4"}, Processes(), id="Slurm"),
        pytest.param((None, None, None), {"SLURM_NTASKS": "1"}, None, id="one Slurm task"),
        pytest.param(
            (None, None, None),
            {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"},
            Processes(),
            id="Kubernetes indexed job",
        ),
        pytest.param((None, None, None), {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None, id="a lone pod"),
        pytest.param((None, None, None), {"TPU_WORKER_HOSTNAMES": "a,b"}, Processes(), id="Cloud TPU slice"),
        pytest.param((None, None, None), {"TPU_WORKER_HOSTNAMES": "a"}, None, id="one TPU host"),
    ],
)
def test_who_asks_for_processes(
    flags: tuple[str | None, int | None, int | None], environment: dict[str, str], expected: Processes | None
) -> None:
    assert asked_for(*flags, environment) == expected


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        pytest.param(("h:1", None, 2), "give all three", id="no process id"),
        pytest.param((None, 0, None), "give all three", id="no coordinator"),
        pytest.param(("host", 0, 2), "is not HOST:PORT", id="no port"),
        pytest.param(("h:99999", 0, 2), "is not HOST:PORT", id="no such port"),
        pytest.param(("h:1", 2, 2), "use 0 to 1", id="one too many"),
    ],
)
def test_flags_that_do_not_fit(flags: tuple[str | None, int | None, int | None], said: str) -> None:
    with pytest.raises(UserError, match=said):
        asked_for(*flags, {})


def windows(rows: list[int], first_step: int = 1, seed: int = 3) -> list[np.ndarray]:
    """Three steps of four windows of 8 bytes from a text of 20, so that epochs end within a step."""
    found = windows_of_steps(
        Windows(np.arange(20, dtype=np.uint8), 8), batch=4, seed=seed, rows=rows, first_step=first_step
    )
    return [next(found) for _ in range(6)]


def test_windows_do_not_depend_on_who_reads_them() -> None:
    """Rows read apart are those of the whole, a later start goes on where it was, and a seed matters."""
    whole = windows([0, 1, 2, 3])
    for rows in ([0, 1], [2, 3], [1]):
        np.testing.assert_array_equal(windows(rows), [step[rows] for step in whole])
    np.testing.assert_array_equal(windows([0, 1, 2, 3], first_step=3)[:4], whole[2:])
    assert not np.array_equal(windows([0, 1, 2, 3], seed=4), whole)
    starts = np.concatenate([step[:, 0] for step in whole])
    assert sorted(starts[:12]) == list(range(12))  # one epoch: each of the 20 - 8 windows once
    assert sorted(starts[12:24]) == list(range(12))
    assert list(starts[:12]) != list(starts[12:24])


def arguments(folder: Path, *more: str) -> list[str]:
    (folder / "plan.toml").write_text(PLAN)
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 50)
    common = (f"--mesh={folder}/plan.toml", f"--text={folder}/text.txt", "--batch=4", "--seq=16", "--steps=3")
    return [*common, *more]


def run(script: str, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "experiments" / script), *flags]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=300)


def losses(path: Path) -> list[float]:
    with path.open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.mark.matrix
def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    one, two = tmp_path / "one.csv", tmp_path / "two.csv"
    alone = run("train.py", *arguments(tmp_path, f"--metrics={one}"))
    assert alone.returncode == 0, alone.stderr
    together = run("launch_local.py", "-n", "2", "--", *arguments(tmp_path, f"--metrics={two}"))
    assert together.returncode == 0, together.stderr
    assert len(losses(one)) == 3
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-5)
    assert together.stdout == alone.stdout  # process 0 alone reports


@pytest.mark.matrix
def test_all_end_when_one_fails(tmp_path: Path) -> None:
    """Three processes cannot share four devices: said by each, and the launcher's exit code."""
    done = run("launch_local.py", "-n", "3", "--", *arguments(tmp_path))
    assert done.returncode == 2
    assert "4 emulated devices do not divide over 3 processes" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.matrix
@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.full), 2])
def test_all_save_and_leave_when_asked(count: int, tmp_path: Path) -> None:
    """SIGTERM in the middle: kept after that step, and the next run goes on from there."""
    flags = arguments(
        tmp_path,
        "--steps=100000",
        "--report_every=1",
        f"--checkpoints={tmp_path}/kept",
        "--checkpoint_every=100000",
        f"--compile_cache={tmp_path}/compiled",
    )
    command = [sys.executable, str(ROOT / "experiments" / "launch_local.py"), "-n", str(count), "--", *flags]

    def until(said: str) -> tuple[str, int]:
        """Wait for a line, ask it to end, and return all lines and the exit code."""
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as run:
            assert run.stderr is not None
            lines = []
            for line in run.stderr:
                lines.append(line)
                if said in line:
                    run.terminate()
            return "".join(lines), run.wait(60)

    told, code = until("step 5/")
    assert code == 143, told
    (step,) = {
        int(one) for one in re.findall(r"asked to end \(SIGTERM\): stops after step (\d+), saved in", told)
    }
    assert told.count("stops after") == count
    assert 5 <= step < 1000
    assert (tmp_path / "kept" / str(step)).is_dir()
    again, code = until(f"step {step + 2}/")
    assert f"goes on after step {step} of" in again
    assert (code, again.count("stops after")) == (143, count)


BATCH = """
import os, sys
from jax._src import distributed
from processes import Processes, join, let_gloo_wait_its_turn
join(Processes(coordinator="127.0.0.1:{port}", index={index}, count=2), emulated_devices=2)
before = set(os.listdir("/proc/self/task"))
let_gloo_wait_its_turn()
made = [int(thread) for thread in set(os.listdir("/proc/self/task")) - before]
print(sum(os.sched_getscheduler(thread) == os.SCHED_BATCH for thread in made), os.sched_getscheduler(0))
sys.stdout.flush()
distributed.global_state.client.wait_at_barrier("both have said it", 60_000)
os._exit(0)
"""


def test_gloo_s_thread_preempts_no_other() -> None:
    """Of the threads that come with the backend one waits for the network: a batch thread, and it alone."""
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    environment = ENVIRONMENT | {"JAX_PLATFORMS": "cpu"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", BATCH.format(port=port, index=index)],
            stdout=subprocess.PIPE, text=True, env=environment,
        )
        for index in (0, 1)
    ]  # fmt: skip
    assert [process.communicate(timeout=60)[0].split()[-2:] for process in both] == [["1", "0"]] * 2


JOIN = """
import processes
processes.JOIN_SECONDS = 2
from shardlab.errors import UserError
try:
    processes.join(processes.Processes(coordinator="127.0.0.1:{port}", index={index}, count=2))
except UserError as error:
    raise SystemExit(str(error))
"""


@pytest.mark.parametrize(
    ("index", "taken", "said"),
    [
        pytest.param(0, False, "not every process came to 127.0.0.1:", id="nobody joins"),
        pytest.param(1, False, "it could not join through 127.0.0.1:", id="no coordinator"),
        pytest.param(0, True, "Address already in use; choose another --coordinator port", id="port in use"),
    ],
)
def test_processes_that_do_not_come_together(index: int, taken: bool, said: str) -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        if not taken:
            server.close()
        started_s = time.monotonic()
        code = JOIN.format(port=port, index=index)
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=False
        )
    assert done.returncode != 0
    assert said in done.stderr
    assert time.monotonic() - started_s < 30
    assert "Traceback" not in done.stderr
