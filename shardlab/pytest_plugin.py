"""The pytest plugin: a mesh for a test, on a machine that need not be there. It loads neither jax nor the
rest of shardlab until a test asks for it.

    @pytest.mark.shardlab(mesh="meshes/plan.toml", on="h100:1x8")     # or axes={"fsdp": 8}, on="cpu:8"
    def test_the_step_gathers_over_fsdp_alone(shardlab_mesh):
        assert_no_collectives_over("tensor", make_step(shardlab_mesh))

`shardlab_mesh` is a `jax.sharding.Mesh` of the plan's axes on the machine's devices; mesh files are looked
for from pytest's root. `--shardlab-update` writes the baselines of `assert_matches_baseline` again.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

_MARK = (
    "shardlab(mesh=None, axes=None, on=None): what shardlab_mesh is made of: a mesh file, or axes such as "
    '{"fsdp": 8}, and a machine such as cpu:8, h100:1x8, v5e:2x4'
)
_KEYS = ("mesh", "axes", "on")
# Read when libtpu is loaded: no TPU is looked for, and another test process may have one too.
_NO_HARDWARE = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--shardlab-update`."""
    group = parser.getgroup("shardlab")
    group.addoption("--shardlab-update", action="store_true", help="write shardlab's baselines again")


def pytest_configure(config: pytest.Config) -> None:
    """The marker; the option as the environment variable that the assertions read."""
    config.addinivalue_line("markers", _MARK)
    if config.getoption("--shardlab-update"):
        from shardlab.testing import UPDATE

        os.environ[UPDATE] = "1"


@pytest.fixture
def shardlab_mesh(request: pytest.FixtureRequest) -> Any:
    """The mesh that the test's `shardlab` marker describes; where there is none it fails, it never skips."""
    from shardlab.errors import ShardlabError

    try:
        return _mesh(_marked(request), request.config.rootpath)
    except ShardlabError as error:
        pytest.fail(str(error), pytrace=False)


def _marked(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The marker's values; one on a test goes before one on its class or module, key by key."""
    known: dict[str, Any] = {}
    for mark in reversed(list(request.node.iter_markers("shardlab"))):
        unknown = [key for key in mark.kwargs if key not in _KEYS]
        if mark.args or unknown:
            pytest.fail(f"the marker is {_MARK.partition(':')[0]}", pytrace=False)
        known |= mark.kwargs
    if ("mesh" in known) == ("axes" in known):
        pytest.fail("mark the test with shardlab(mesh=FILE) or shardlab(axes={...})", pytrace=False)
    return known


def _mesh(marked: dict[str, Any], root: Path) -> Any:
    from shardlab.spec.case import machine_spec
    from shardlab.spec.plan import Plan, load_plan

    if "mesh" in marked:
        plan = load_plan(root / marked["mesh"])
    else:
        plan = Plan(name="axes", axes=dict(marked["axes"]))
    spec = machine_spec(plan, marked.get("on"))
    os.environ |= _NO_HARDWARE
    from shardlab.compile.mesh import mesh_on  # jax is loaded here, not before

    return mesh_on(spec, plan.axes, plan.order)
