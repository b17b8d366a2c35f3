"""The pytest plugin in a user's tests: what it gives, what it refuses, and that it costs nothing unasked."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[1]
# The plugin by its module, whether or not this environment has registered it.
PLUGIN = ("-p", "shardlab.pytest_plugin", "-p", "no:cacheprovider", "--strict-markers")
PLAN = 'on = "cpu:8"\n[axes]\ndata = 2\nmodel = 4\n'
HEAD = """
import os
import pytest
from pathlib import Path
"""
STEP = """
def make_step(mesh):
    import jax, jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec as P
    x = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=NamedSharding(mesh, P("model")))
    return {"twice": (jax.jit(jnp.sum), (x,), 2), "once": (jax.jit(jnp.max), (x,))}
"""
SENT = 3 * 6  # of a f32 summed over four: 2 · 3/4 · 4


@pytest.fixture
def users(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A user's folder, with one mesh file."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # other plugins load what they like
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)  # other tests of this process set it
    (pytester.path / "plan.toml").write_text(PLAN)
    return pytester


def test_meshes_and_steps_on_emulated_devices(users: pytest.Pytester) -> None:
    """A mesh file, a class's axes and a test's own machine, an assertion on each, a baseline."""
    users.makepyfile(
        HEAD
        + STEP
        + f"""
from shardlab.testing import assert_collectives, assert_matches_baseline, assert_no_collectives_over
from shardlab.testing import assert_wire_bytes_below

@pytest.mark.shardlab(mesh="plan.toml")
def test_a_mesh_file(shardlab_mesh):
    assert dict(shardlab_mesh.shape) == {{"data": 2, "model": 4}}
    step = make_step(shardlab_mesh)
    assert_collectives(step, expect={{("all-reduce", "model"): 3}})
    assert_no_collectives_over("data", step)
    assert_wire_bytes_below(step, limit={SENT + 1})
    with pytest.raises(AssertionError, match="{SENT} B per step"):
        assert_wire_bytes_below(step, limit={SENT})
    assert_matches_baseline("step.baseline.json", step)

@pytest.mark.shardlab(axes={{"model": 4}}, on="cpu:8")
class TestAxes:
    @pytest.mark.shardlab(on="cpu:4")
    def test_the_tests_own_machine(self, shardlab_mesh):
        assert shardlab_mesh.size == 4
"""
    )
    users.runpytest_subprocess(*PLUGIN, "--shardlab-update").assert_outcomes(passed=2)
    users.runpytest_subprocess(*PLUGIN).assert_outcomes(passed=2)


def test_what_cannot_be_made_fails_and_says_why(users: pytest.Pytester) -> None:
    cases = {
        'mesh="none.toml"': "*none.toml*No such file*",
        'mesh="plan.toml", on="cpu:16"': "*the plan has data 2 x model 4 = 8 devices, but cpu:16 has 16*",
        'axes={"x": 16}, on="cpu:16"': "*this process has 8 emulated devices; set XLA_FLAGS=*_count=16*",
        'mesh="plan.toml", axes={"x": 8}': "*mark the test with shardlab(mesh=FILE) or shardlab(axes={...})",
        "'plan.toml'": "*the marker is shardlab(mesh=None, axes=None, on=None)",
        'mesh="plan.toml", machine="cpu:8"': "*the marker is shardlab(mesh=None, axes=None, on=None)",
    }
    tests = [
        f"@pytest.mark.shardlab({marker})\ndef test_{number}(shardlab_mesh): ...\n"
        for number, marker in enumerate(cases)
    ]
    users.makepyfile(HEAD + "\n".join([*tests, "def test_unmarked(shardlab_mesh): ..."]))
    done = users.runpytest_subprocess(*PLUGIN)
    done.assert_outcomes(errors=len(cases) + 1)
    done.stdout.fnmatch_lines([*cases.values(), "*mark the test with shardlab*"])
    assert "Traceback" not in done.stdout.str()


def test_tests_that_do_not_ask_load_nothing(users: pytest.Pytester) -> None:
    """Also where they are marked, and collected from a module that imports the assertions."""
    users.makepyfile(
        HEAD
        + """
import sys

@pytest.mark.shardlab(axes={"x": 8}, on="cpu:8")
def test_nothing():
    loaded = {"jax", "numpy", "pydantic", "rich"} & set(sys.modules)
    assert not loaded
    assert [name for name in sys.modules if name.startswith("shardlab.")] == ["shardlab.pytest_plugin"]
    assert "TPU_SKIP_MDS_QUERY" not in os.environ
"""
    )
    users.runpytest_subprocess(*PLUGIN, "-W", "error").assert_outcomes(passed=1)


def test_it_is_registered_where_shardlab_is_installed() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"shardlab": "shardlab.pytest_plugin"}


@pytest.mark.matrix
@pytest.mark.gpu
def test_a_mesh_of_gpus_that_are_not_there(users: pytest.Pytester) -> None:
    """XLA:GPU reduces over the four as XLA:CPU does."""
    users.makepyfile(
        HEAD
        + STEP
        + f"""
from shardlab.testing import assert_wire_bytes_below

@pytest.mark.shardlab(mesh="plan.toml", on="h100:1x8")
def test_gpus(shardlab_mesh):
    assert shardlab_mesh.devices.flat[0].platform == "gpu"
    with pytest.raises(AssertionError, match="{SENT} B per step over model"):
        assert_wire_bytes_below(make_step(shardlab_mesh), limit=1, over="model")
"""
    )
    users.runpytest_subprocess(*PLUGIN).assert_outcomes(passed=1)
