"""`shardlab record` on a real trainer: a process of its own, counted by arithmetic."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from shardlab import record
from shardlab.analysis import analyze
from shardlab.cli import main
from shardlab.recording import read_recording

# Five steps of four microbatches, one of which runs the function compiled ahead of time, and an update; the
# gradients of one device's rows of x summed over data: 16 x 16 f32 of each weight, 2 · 3/4 of it.
TRAINER = """
import os, signal, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
split = {"up": NamedSharding(mesh, P(None, "model")), "down": NamedSharding(mesh, P("model", None))}
loss = lambda w, x: jnp.sum(jnp.tanh(x @ w["up"]) @ w["down"])
add = lambda sums, w, x: jax.tree_util.tree_map(jnp.add, sums, jax.grad(loss)(w, x))
def update(w, sums):
    step = jax.tree_util.tree_map(lambda a, b: a - 0.1 * b, w, sums)
    return step, jax.tree_util.tree_map(jnp.zeros_like, sums)
def accumulate(sums, w, x):
    return add(sums, w, x)

accumulate = jax.jit(accumulate, donate_argnums=0, out_shardings=split)
update = jax.jit(update, out_shardings=(split, split))
w = {"up": np.ones((16, 32), np.float32), "down": np.ones((32, 16), np.float32)}
w = jax.device_put(w, split)
sums = jax.tree_util.tree_map(jnp.zeros_like, w)
x = jax.device_put(np.ones((16, 16), np.float32), NamedSharding(mesh, P("data")))
ahead = accumulate.lower(sums, w, x).compile()
for step in range(5):
    for _ in range(3):
        sums = accumulate(sums, w, x)
    sums = ahead(sums, w, x)
    w, sums = update(w, sums)
print("trained", float(w["up"].addressable_data(0)[0, 0]))
END
"""
GRADIENTS = 2 * 16 * 16 * 4 * 2 * 3 // 4


# Two processes of four devices: one f32 of each device's rows, summed over all eight.
JOB = """
import subprocess, sys
import jax

if len(sys.argv) == 2:
    others = [subprocess.Popen([sys.executable, __file__, sys.argv[1], rank]) for rank in "01"]
    sys.exit(max(one.wait() for one in others))
jax.distributed.initialize(f"localhost:{sys.argv[1]}", num_processes=2, process_id=int(sys.argv[2]))
import jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("hosts", "local"))
rows = NamedSharding(mesh, P(("hosts", "local")))
x = jax.make_array_from_callback((16, 8), rows, lambda index: np.ones((16, 8), np.float32)[index])
total = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, P()))
for _ in range(3):
    assert total(x).addressable_data(0) == 128
"""


@pytest.fixture
def eight_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")


def trainer(folder: Path, end: str = "") -> list[str]:
    path = folder / "train.py"
    path.write_text(TRAINER.replace("END", end))
    return [sys.executable, str(path)]


def test_a_trainer_is_recorded_with_no_change_to_it(
    tmp_path: Path, eight_devices: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """Jitted and compiled ahead, every call counts; the document is alone on standard output."""
    out = tmp_path / "recorded"
    flags = ["record", "--out", str(out), "--steps", "5", "--json", "--", *trainer(tmp_path)]
    assert main(flags) == 0
    captured = capfd.readouterr()
    document = json.loads(captured.out)
    assert "trained 1.0" in captured.err  # a saturated tanh has no gradient
    assert [(one["name"], one.get("runs_per_step", 1)) for one in document["modules"]] == [
        ("jit_accumulate", 4),
        ("jit_update", 1),
    ]
    assert document["mesh"] == {"data": 4, "model": 2}
    assert document["totals"]["wire_bytes"] == [4 * GRADIENTS, 4 * GRADIENTS]
    assert document["totals"]["by_axes"].keys() == {"data"}
    step = read_recording(out, 5)
    assert step.device_ids == tuple(range(8))
    assert [one.memory is not None for one in step.programs] == [True, True]
    assert analyze(step).totals.wire_bytes == (4 * GRADIENTS, 4 * GRADIENTS)


def test_a_trainer_that_is_killed_leaves_its_counts(
    tmp_path: Path, eight_devices: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """Exit 2, since the command failed; what it ran until then is there, within a second."""
    end = "import time; time.sleep(1.1); update(w, sums); os.kill(os.getpid(), signal.SIGKILL)"
    out = tmp_path / "recorded"
    assert main(["record", "--out", str(out), "--steps", "5", "--", *trainer(tmp_path, end)]) == 2
    captured = capfd.readouterr()
    assert "the command exited with -9" in captured.err
    assert "it was killed: its counts may be a second old" in captured.out
    assert "4 × jit_accumulate, 1 × jit_update" in captured.out


@pytest.mark.full
def test_a_job_of_two_processes_is_one_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each writes its own file; what both ran is counted once: 2 · 7/8 of a f32."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    path, out = tmp_path / "job.py", tmp_path / "recorded"
    path.write_text(JOB)
    assert main(["record", "--out", str(out), "--json", "--", sys.executable, str(path), str(port)]) == 0
    document = json.loads(capfd.readouterr().out)
    assert document["totals"]["wire_bytes"] == [7, 7]
    assert document["mesh"] == {"hosts": 2, "local": 4}
    assert document["ledger"] == []
    assert len(list(out.glob("recording-*.json"))) == 2


def test_a_folder_that_is_in_use_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("x")
    assert main(["record", "--out", str(tmp_path), "--", "python", "train.py"]) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ([], "record: no command; shardlab record -- python train.py"),
        (["no-such-command-here"], "no-such-command-here: No such file or directory"),
        ([sys.executable, "-c", "pass"], "nothing was recorded"),
    ],
    ids=["none", "unknown", "no-jax"],
)
def test_a_command_that_records_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str], says: str
) -> None:
    assert main(["record", "--out", str(tmp_path / "out"), "--", *command]) == 2
    assert says in capsys.readouterr().err


def test_by_itself_it_is_one_file_of_nothing_but_python(tmp_path: Path) -> None:
    """Copied elsewhere, under a Python that sees no shardlab; the user's own sitecustomize is run too."""
    copy, theirs = tmp_path / "record.py", tmp_path / "theirs"
    copy.write_bytes(Path(record.__file__).read_bytes())
    theirs.mkdir()
    (theirs / "sitecustomize.py").write_text("import sys; sys.theirs = __file__")
    script = "import sys, sitecustomize as s; print(sys.theirs == s.__file__, 'jax' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-I", str(copy), "--out", str(tmp_path / "out"), "--", sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(theirs)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "True False\n"
    assert list((tmp_path / "out").iterdir()) == []


FAKE = textwrap.dedent(
    """
    class ExecuteReplicated:
        __slots__ = ["xla_executable"]

        def __init__(self, xla_executable):
            self.xla_executable = xla_executable

        def __call__(self, *args):
            return ["out"]
    """
)


class Module:
    """A compiled module as XLA gives it."""

    def __init__(self, text: str) -> None:
        self.text = text

    def to_string(self, options: object = None) -> str:
        return self.text


class Executable:
    """A loaded program of two devices, or one that fails when it is asked."""

    def __init__(self, text: str | None) -> None:
        self.text = text

    def hlo_modules(self) -> list[Module]:
        if self.text is None:
            raise RuntimeError("gone")
        return [Module(self.text)]


def counted(folder: Path, *texts: str | None) -> tuple[record.Recorder, list[object]]:
    namespace: dict[str, object] = {}
    exec(FAKE, namespace)
    runner = type("runner", (), namespace)
    recorder = record.Recorder(str(folder))
    record.count_runs(runner, recorder)
    return recorder, [runner.ExecuteReplicated(Executable(text)) for text in texts]  # type: ignore[attr-defined]


def test_what_jax_asks_for_is_no_instance_and_runs_are_counted(tmp_path: Path) -> None:
    text = "HloModule jit_f, is_scheduled=true, num_partitions=2\n"
    recorder, (once, twice, small) = counted(tmp_path, text, text, "HloModule jit_g\n")
    assert [one() for one in (once, twice, twice, small)] == [["out"]] * 4  # type: ignore[operator]
    assert [(one["name"], one["runs"], one["num_devices"]) for one in recorder.programs.values()] == [
        ("jit_f", 3, 2)
    ]
    assert list(recorder.small.values()) == [{"name": "jit_g", "runs": 1}]


def test_a_program_that_cannot_be_described_still_runs(tmp_path: Path) -> None:
    recorder, (broken,) = counted(tmp_path, None)
    assert [broken(), broken()] == [["out"], ["out"]]  # type: ignore[operator]
    assert set(recorder.problems) == {"a program could not be described: RuntimeError: gone"}


def test_a_jax_that_runs_programs_otherwise_is_said(tmp_path: Path) -> None:
    recorder = record.Recorder(str(tmp_path))
    record.count_runs(type("runner", (), {}), recorder)
    assert recorder.problems[0].startswith("this JAX runs programs in a way that is not known")


def test_a_forked_process_starts_anew(tmp_path: Path) -> None:
    recorder, (once,) = counted(tmp_path, "HloModule jit_f, num_partitions=2\n")
    once()  # type: ignore[operator]
    recorder.start()
    assert (recorder.programs, recorder.small) == ({}, {})
