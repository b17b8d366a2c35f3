import dataclasses
import os
import subprocess
import sys

import pytest
from compile.cases import tiny_case, tiny_plan

from shardlab.compile import program_key
from shardlab.spec.case import Case

BASE = tiny_case("h100:1x8")


@pytest.mark.parametrize(
    "same",
    [
        pytest.param(tiny_case("h100:2x4"), id="other hosts, same GPUs"),
        pytest.param(tiny_case("h100:8x1"), id="one GPU a host"),
        pytest.param(
            tiny_case("h100:1x8", plan={"name": "other", "path": "x.toml", "description": "d"}), id="labels"
        ),
        pytest.param(tiny_case("h100:1x8", plan={"on": "h100:1x8", "check": {"batch": 64}}), id="defaults"),
        pytest.param(
            tiny_case("h100:1x8", plan={"params": dict(reversed(tiny_plan(4, 2).params.items()))}),
            id="order of rules",
        ),
        pytest.param(
            tiny_case("h100:1x8", plan={"flags": ("--xla_tpu_a=1",)}), id="a flag that never gets there"
        ),
    ],
)
def test_same_program(same: Case) -> None:
    assert program_key(same) == program_key(BASE)


DIFFERENT = {
    "base": BASE,
    "chip": tiny_case("a100:1x8"),
    "family": tiny_case("cpu:8"),
    "tpu": tiny_case("v5e:2x4"),
    "tpu slices": tiny_case("v5e:2x2*2"),
    "tpu torus": tiny_case("v5p:2x2x2"),
    "tpu torus shape": tiny_case("v5e:4x4", 8, 2),
    "more devices": tiny_case("h100:2x8", 8, 2),
    "batch": tiny_case("h100:1x8", batch=8),
    "seq": tiny_case("h100:1x8", seq=256),
    "workload": tiny_case("h100:1x8", workload="train"),
    "unrolled": tiny_case("h100:1x8", scan_layers=False),
    "model": tiny_case("h100:1x8", model=dataclasses.replace(BASE.model, mlp=256)),
    "axes order": tiny_case("h100:1x8", plan={"axes": {"tensor": 2, "data": 4}}),
    "axes sizes": tiny_case("h100:1x8", 2, 4, batch=4),
    "device order": tiny_case("h100:1x8", plan={"order": "row-major"}),
    "rules": tiny_case("h100:1x8", plan={"params": {}}),
    "method": tiny_case("h100:1x8", plan={"method": {"remat": "none"}}),
    "flags": tiny_case("h100:1x8", plan={"flags": ("--xla_gpu_a=1",)}),
    "flags order": tiny_case("h100:1x8", plan={"flags": ("--xla_gpu_a=1", "--xla_gpu_a=2")}),
    "flags reversed": tiny_case("h100:1x8", plan={"flags": ("--xla_gpu_a=2", "--xla_gpu_a=1")}),
}


def test_different_programs_have_different_keys() -> None:
    keys = {name: program_key(case) for name, case in DIFFERENT.items()}
    same = [(a, b) for a in keys for b in keys if a < b and keys[a] == keys[b]]
    assert not same


def test_stable_between_processes_and_hash_seeds() -> None:
    script = "import sys; from shardlab.spec.case import Case; from shardlab.compile import program_key\n"
    script += "print(program_key(Case.model_validate_json(sys.stdin.read())))"
    keys = {
        subprocess.run(
            [sys.executable, "-c", script],
            input=BASE.model_dump_json(),
            env={"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert keys == {program_key(BASE)}
