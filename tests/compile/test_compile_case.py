"""Real compiles of the tiny model in child processes, and the ways in which they end badly."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from compile.cases import tiny_case
from compiled_plans import quick

from shardlab.analysis import analyze
from shardlab.compile import compile_case
from shardlab.cost.instructions import step_cost
from shardlab.errors import CompileFailed, Infeasible, ShardlabError, UserError
from shardlab.hlo.reader import parse
from shardlab.program import Program, load, save
from shardlab.spec.case import Case

GIB = 1 << 30


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go, so that a test can see what was left."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def tiny_parameters() -> int:
    """Elements of the tiny model's parameters, by hand from its configuration.

    Two layers of: query, key, value, output 128 x 128; gate, up, down 128 x 512; two norms of 128. Besides:
    embedding and output of 512 x 128, a final norm of 128.
    """
    layer = 4 * 128 * 128 + 3 * 128 * 512 + 2 * 128
    return 2 * layer + 2 * 512 * 128 + 128


def test_importing_the_package_does_not_import_jax() -> None:
    script = (
        "import sys, shardlab.compile, shardlab.compile.doctor as d; d.targets(); print('jax' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_emulated_cpu(tmp_path: Path, scratch: Path) -> None:
    """Arguments: replicated bf16 parameters, 2 bytes each, and one sequence of 128 int32 tokens."""
    case = tiny_case("cpu:8", plan={"params": {}, "optimizer": {}})
    program = compile_case(case, proto_to=tmp_path / "module.pb")
    assert (program.backend, program.num_devices, program.autotuned) == ("cpu", 8, None)
    assert program.device_ids == tuple(range(8))
    assert program.mesh == {"data": 4, "tensor": 2}
    assert program.hlo_text.startswith("HloModule jit_prefill")
    assert "num_partitions=8" in program.hlo_text
    assert program.memory is not None
    assert program.memory.argument_bytes == 2 * tiny_parameters() + 4 * 128
    assert program.versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert "jaxlib" in program.versions
    assert b"jit_prefill" in (tmp_path / "module.pb").read_bytes()[:64]
    assert [path.name for path in scratch.iterdir()] == ["module.pb"]
    save(program, tmp_path / "saved")
    assert load(tmp_path / "saved") == program


@pytest.mark.tpu
def test_two_slices_of_tpu_at_once_with_another_compile() -> None:
    """Two processes hold libtpu at the same time; each gets its own program."""
    with ThreadPoolExecutor(2) as pool:
        slices, single = pool.map(compile_case, [tiny_case("v5e:2x2*2"), tiny_case("v5p:2x2x2")])
    assert "num_partitions=4" in slices.hlo_text
    assert "num_partitions=8" in single.hlo_text
    assert slices.num_devices == single.num_devices == 8
    assert slices.device_ids is not None
    assert [i // 4 for i in slices.device_ids] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert single.device_coords is not None
    assert single.device_coords[:3] == ((0, 0, 0), (1, 0, 0), (0, 1, 0))
    assert "libtpu" in single.versions
    assert "tpu_custom_call" in single.hlo_text, "attention is the TPU's fused kernel"


@pytest.mark.gpu
def test_gpu_ahead_of_time() -> None:
    program = compile_case(
        tiny_case("h100:2x4", plan={"flags": ("--xla_gpu_enable_latency_hiding_scheduler=true",)})
    )
    assert (program.backend, program.num_devices, program.autotuned) == ("gpu", 8, False)
    assert "num_partitions=8" in program.hlo_text
    assert "__cudnn$fmha" in program.hlo_text, "attention is the GPU's fused kernel"
    assert program.flags.effective == ("--xla_gpu_enable_latency_hiding_scheduler=true",)
    assert program.flags.rejected == ()
    assert {"jax-cuda13-plugin", "nvidia-cuda-nvcc"} <= set(program.versions)


BAD_CPU = "--xla_cpu_no_such_flag=1"
BAD_VALUE = "--xla_cpu_enable_fast_math=banana"
BAD_TPU = "--xla_tpu_no_such_flag=1"


@pytest.mark.parametrize(
    ("machine", "flags", "effective", "rejected"),
    [
        pytest.param(
            "cpu:8",
            ("--xla_cpu_enable_fast_min_max=true", BAD_CPU, BAD_VALUE, "--xla_gpu_x=1"),
            ("--xla_cpu_enable_fast_min_max=true",),
            {
                BAD_CPU: "unknown to this XLA",
                BAD_VALUE: "'banana' is not a value for it",
                "--xla_gpu_x=1": "a gpu flag, and the target is cpu",
            },
            id="XLA",
        ),
        pytest.param(
            "v5e:2x4", (BAD_TPU,), (), {BAD_TPU: "unknown to this libtpu"}, id="libtpu", marks=pytest.mark.tpu
        ),
    ],
)
def test_rejected_flags_are_reported_and_left_out(
    machine: str, flags: tuple[str, ...], effective: tuple[str, ...], rejected: dict[str, str]
) -> None:
    program = compile_case(tiny_case(machine, plan={"flags": flags}))
    assert program.hlo_text
    assert program.flags.requested == flags
    assert program.flags.effective == effective
    assert dict(program.flags.rejected) == rejected


@pytest.mark.tpu
def test_what_does_not_fit_has_its_deficit_and_the_largest_batch() -> None:
    """Unfused scores, 8 heads x 16384 x 16384 in f32, are 8 GiB a sequence; the chip has 15.75 GiB."""
    attention = {"method": {"attention": "reference"}, "activations": {"batch": ("data",)}}
    program = compile_case(tiny_case("v5e:2x2", 4, 1, plan=attention, batch=16, seq=16384))
    assert program.refusal is not None
    assert program.refusal.limit_bytes == 15.75 * GIB
    assert program.refusal.needed_bytes > 15.75 * GIB
    assert program.refusal.largest_batch == 4
    assert program.hlo_text == ""
    assert program.memory is None


@pytest.mark.parametrize(
    ("case", "error", "says"),
    [
        pytest.param(
            tiny_case("cpu:6", 1, 6, batch=1), Infeasible, "over 6 devices", id="8 heads over 6 devices"
        ),
        pytest.param(
            tiny_case("cpu:4"), UserError, "4 x 2 = 8 positions for 4 devices", id="too few devices"
        ),
        pytest.param(tiny_case("h1000:1x8"), UserError, "unknown machine", id="no such machine"),
    ],
)
def test_what_cannot_be_compiled_says_so(
    case: Case, error: type[ShardlabError], says: str, scratch: Path
) -> None:
    with pytest.raises(error, match=says):
        compile_case(case)
    assert list(scratch.iterdir()) == []


def children() -> list[int]:
    """Process ids of this process's compile children."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            command = (path / "cmdline").read_bytes()
        except (OSError, ValueError):
            continue
        if parent == os.getpid() and b"shardlab.compile.child" in command:
            found.append(int(path.name))
    return found


def test_a_killed_compile_leaves_nothing(scratch: Path) -> None:
    results: list[Program | CompileFailed] = []

    def run() -> None:
        try:
            results.append(compile_case(tiny_case("cpu:8", workload="train"), proto_to=scratch / "module.pb"))
        except CompileFailed as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    while not children():
        time.sleep(0.01)
    (child,) = children()
    time.sleep(1.0)  # well into its work
    os.kill(child, signal.SIGKILL)
    thread.join(timeout=60)
    (error,) = results
    assert isinstance(error, CompileFailed)
    assert "killed by SIGKILL" in error.why
    assert [str(path) for path in scratch.iterdir()] == [error.log]
    assert children() == []


def test_time_out(scratch: Path) -> None:
    with pytest.raises(CompileFailed, match=r"stopped after 0\.3 s") as caught:
        compile_case(tiny_case("cpu:8"), timeout_s=0.3)
    assert [str(path) for path in scratch.iterdir()] == [caught.value.log]
    assert children() == []


@pytest.mark.parametrize(
    "machine",
    [
        pytest.param("cpu:8", marks=pytest.mark.matrix),
        pytest.param("h100:1x8", marks=[pytest.mark.gpu, pytest.mark.full]),
    ],
)
def test_what_other_tests_spare_the_compiler_changes_nothing_that_they_read(machine: str) -> None:
    """Collectives, what every instruction computes and reads, and memory."""
    whole = tiny_case(machine, workload="train")
    programs = [compile_case(case) for case in (whole, quick(whole))]
    assert [len(program.flags.effective) for program in programs] == [0, 1]
    collectives, costs, memory = zip(
        *(
            (analyze(one).collectives, step_cost(parse(one.hlo_text)[0], one.backend), one.memory)
            for one in programs
        ),
        strict=True,
    )
    assert collectives[0] == collectives[1]
    assert costs[0] == costs[1]
    assert memory[0] == memory[1]
