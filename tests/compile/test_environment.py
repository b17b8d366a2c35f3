import pytest

from shardlab.compile.environment import child_environment, split_flags
from shardlab.hardware.catalog import load_machine

USERS = {
    "PATH": "/bin",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=3",
    "LIBTPU_INIT_ARGS": "--xla_tpu_mine=1",
    "JAX_ENABLE_X64": "1",
    "TPU_NAME": "t",
}


@pytest.mark.parametrize(
    ("flag", "family", "why"),
    [
        pytest.param("--xla_gpu_enable_latency_hiding_scheduler=true", "gpu", None, id="gpu on gpu"),
        pytest.param("--xla_tpu_enable_async_collective_fusion=true", "tpu", None, id="tpu on tpu"),
        pytest.param("--xla_enable_async_all_gather=true", "tpu", None, id="anyone's"),
        pytest.param("--xla_gpu_a=1", "tpu", "a gpu flag, and the target is tpu", id="gpu on tpu"),
        pytest.param("--megascale_port=1", "gpu", "a tpu flag, and the target is gpu", id="megascale on gpu"),
        pytest.param("--xla_gpu_a=1", "attached", None, id="gpu on attached"),
        pytest.param(
            "--xla_dump_to=/etc", "gpu", "a plan may not write files; use --hlo or --save", id="writes files"
        ),
        pytest.param(
            "--xla_force_host_platform_device_count=9",
            "cpu",
            "the machine decides the number of devices",
            id="count",
        ),
    ],
)
def test_split_flags(flag: str, family: str, why: str | None) -> None:
    assert split_flags((flag,), family) == (((flag,), ()) if why is None else ((), ((flag, why),)))


@pytest.mark.parametrize(
    ("machine", "variable", "value"),
    [
        pytest.param("cpu:8", "XLA_FLAGS", "--xla_force_host_platform_device_count=8 --a --b=1", id="cpu"),
        pytest.param("h100:1x8", "XLA_FLAGS", "--a --b=1", id="gpu"),
        pytest.param("v5e:2x4", "LIBTPU_INIT_ARGS", "--a --b=1", id="tpu"),
    ],
)
def test_flags_go_where_the_compiler_reads_them(machine: str, variable: str, value: str) -> None:
    environment = child_environment(load_machine(machine), ("--a", "--b=1"), USERS)
    assert environment[variable] == value
    assert environment["JAX_PLATFORMS"] == "cpu"
    assert environment["PATH"] == "/bin"


@pytest.mark.parametrize("machine", ["cpu:8", "h100:1x8", "v5e:2x4"])
def test_nothing_inherited_changes_the_program(machine: str) -> None:
    environment = child_environment(load_machine(machine), (), USERS)
    inherited = {key for key, value in USERS.items() if environment.get(key) == value}
    assert inherited == {"PATH"}


def test_attached_keeps_what_describes_the_users_hardware() -> None:
    flags = ("--xla_gpu_a=1", "--xla_tpu_b=2")
    environment = child_environment(load_machine("attached:8"), flags, USERS)
    assert environment["XLA_FLAGS"] == "--xla_force_host_platform_device_count=3 --xla_gpu_a=1"
    assert environment["LIBTPU_INIT_ARGS"] == "--xla_tpu_mine=1 --xla_tpu_b=2"
    assert environment["JAX_ENABLE_X64"] == "1"
    assert "JAX_PLATFORMS" not in environment
