import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from compile.cases import tiny_case, tiny_plan

from shardlab.compile import key as keys
from shardlab.compile import program_key
from shardlab.compile.key import lowered_key, program_name, relabelled
from shardlab.compile.versions import BUILDERS, source_digest
from shardlab.program import Flags, Program
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


PACKAGE = Path(keys.__file__).parents[1]
# What the child imports beside the builders, and why its code is in no key: errors and the record decide no
# program, and of hardware the facts that reach the compiler are in the key.
NOT_IN_A_KEY = {"errors", "program", "store", "hardware"}


def test_all_code_that_builds_a_program_is_in_the_key() -> None:
    script = "import sys, shardlab.compile.child, shardlab.compile.build\n"
    script += "print(*{name.split('.')[1] for name in sys.modules if name.startswith('shardlab.')})"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(done.stdout.split()) == {*BUILDERS, *NOT_IN_A_KEY}


@pytest.mark.parametrize("name", [*BUILDERS, "cost"])
def test_a_changed_source_changes_the_key_where_it_builds_programs(name: str, tmp_path: Path) -> None:
    for folder in (*BUILDERS, "cost"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").write_text("x = 1\n")
    before = source_digest.__wrapped__(tmp_path)
    (tmp_path / name / "a.py").write_text("x = 2\n")
    assert (source_digest.__wrapped__(tmp_path) != before) == (name != "cost")


def test_the_users_own_sources_count(tmp_path: Path) -> None:
    (tmp_path / "step.py").write_text("x = 1\n")
    (tmp_path / "config.yaml").write_text("layers: 2\n")
    known = [program_key(BASE, [tmp_path])]
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "step.pyc").write_text("")
    assert program_key(BASE, [tmp_path]) == known[0] != program_key(BASE)
    for name in ("step.py", "config.yaml"):
        (tmp_path / name).write_text("x: 2\n")
        known.append(program_key(BASE, [tmp_path]))
    assert len(set(known)) == 3


def test_a_compilers_version_counts_and_what_runs_it_does_not() -> None:
    known = {"jax": "1", "jaxlib": "1", "flax": "1", "python": "3.11", "shardlab": "1"}
    of = {name: program_key(BASE, (), {**known, name: "2"}) for name in known}
    assert {name for name, key in of.items() if key != program_key(BASE, (), known)} == {
        "jax",
        "jaxlib",
        "flax",
    }


LOWERED = """\
#loc1 = loc("x")
module @jit_f {
  func.func public @main(%arg0: tensor<8xf32> loc("x")) -> tensor<8xf32> {
    %0 = stablehlo.sine %arg0 : tensor<8xf32> loc(#loc5)
    return %0 : tensor<8xf32> loc(#loc)
  } loc(#loc)
} loc(#loc)
#loc = loc(unknown)
#loc2 = loc("model.py":12:4 to :10)
#loc3 = loc("forward"(#loc2))
#loc4 = loc(callsite(#loc3 at #loc2))
#loc5 = loc("jit(f)/mlp/sin"(#loc4))
"""


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("12:4", "99:4", True),
        ("model.py", "moved.py", True),
        ('"forward"', '"ahead"', True),
        ("mlp/sin", "attention/sin", False),
        ('loc("x")', 'loc("y")', False),
        ("sine", "cosine", False),
    ],
    ids=["line", "file", "function", "layer", "argument", "operation"],
)
def test_lines_do_not_count_and_names_do(old: str, new: str, same: bool) -> None:
    """Layers and phases come from names of operations, owners of memory from those of arguments."""
    changed = LOWERED.replace(old, new)
    assert changed != LOWERED
    assert (lowered_key("t", (0, 1), changed) == lowered_key("t", (0, 1), LOWERED)) == same
    assert lowered_key("u", (0, 1), LOWERED) != lowered_key("t", (0, 1), LOWERED)
    assert lowered_key("t", (1, 0), LOWERED) != lowered_key("t", (0, 1), LOWERED)


def test_a_kept_program_takes_the_labels_of_the_case_that_found_it() -> None:
    case = tiny_case("h100:1x8", plan={"name": "other", "flags": ("--xla_tpu_a=1", "--xla_gpu_b=1")})
    flags = Flags(effective=(), rejected=(("--xla_gpu_b=1", "unknown to this XLA"),))
    kept = Program(
        name="first", backend="gpu", hlo_text="HloModule m", num_devices=8, flags=flags, compile_s=1
    )
    found = relabelled(kept, case, {"jax": "1"})
    assert (found.name, found.compile_s, dict(found.versions)) == (program_name(case), None, {"jax": "1"})
    assert found.flags.requested == case.plan.flags
    assert [flag for flag, _ in found.flags.rejected] == ["--xla_tpu_a=1", "--xla_gpu_b=1"]
