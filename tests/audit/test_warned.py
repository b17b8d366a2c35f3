"""What the partitioner warns of while it compiles, here and now, and a step that it reshards without."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from shardlab.analysis import attribute
from shardlab.audit import Finding, audit
from shardlab.compile.logs import warnings
from shardlab.program import Program

MESH = {"x": 4, "y": 2}
BEFORE = P("y", None, "x")
Capture = pytest.CaptureFixture[str]


def found(after: P, capfd: Capture) -> list[Finding]:
    """What the audit says of a step that goes from BEFORE to another sharding."""
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), tuple(MESH))

    def step(a: jax.Array) -> jax.Array:
        b = jax.lax.with_sharding_constraint(jnp.sin(a), NamedSharding(mesh, BEFORE))
        return jax.lax.with_sharding_constraint(b * 2, NamedSharding(mesh, after))

    a = jax.ShapeDtypeStruct((8, 16, 4), jnp.float32, sharding=NamedSharding(mesh, BEFORE))
    capfd.readouterr()
    text = jax.jit(step).lower(a).compile().as_text()
    log = capfd.readouterr().err
    program = Program(
        name="p", backend="cpu", hlo_text=text, num_devices=8, mesh=MESH, warnings=warnings(log)
    )
    (part,) = attribute(program)
    assert part.analysis.collectives
    return [finding for finding in audit(part) if finding.rule == "rematerialized"]


def test_the_two_shardings_in_conflict_are_named_at_the_gather_that_came_of_them(capfd: Capture) -> None:
    (finding,) = found(P(None, ("x", "y"), None), capfd)
    # XLA of jax 0.10 gives the gathers the name of what uses the array: the operation alone is named there.
    expected = "all-gather" if jax.__version_info__ >= (0, 11) else "sharding_constraint"
    assert finding.instruction.startswith(expected)
    conflict = re.search(r"from sharding (\{.+\}) to (\{.+\}) at ", finding.evidence)
    assert conflict and conflict[1] != conflict[2]  # how they are written depends on the release


def test_a_gather_over_an_axis_that_is_only_dropped_is_no_rematerialization(capfd: Capture) -> None:
    assert found(P("y", None, None), capfd) == []
