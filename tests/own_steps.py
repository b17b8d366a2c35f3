"""Step functions of a user's own for the tests: modules in a folder, compiled in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shardlab.compile.build import compile_here, open_case
from shardlab.program import Program
from shardlab.spec.plan import Plan
from shardlab.spec.step import make_step_case

HEAD = """\
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P

def struct(mesh, *shape, over=None):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(over)))

def total(x):
    return jnp.sum(x)

"""

# One f32 summed over all devices.
SUM = "def make_step(mesh):\n    return jax.jit(total), (struct(mesh, 16, over='x'),)\n"


def mesh_plan(axes: dict[str, int] | None = None, **fields: Any) -> Plan:
    """A plan of nothing but a mesh."""
    return Plan(name="own", axes=axes or {"x": 8}, on="cpu:8", **fields)


def write_step(folder: Path, body: str, name: str = "mine", head: str = HEAD) -> str:
    """A module with that body; the step that it makes."""
    (folder / f"{name}.py").write_text(head + body)
    return f"{name}:make_step"


def compiled(step: str, folder: Path, plan: Plan | None = None, **values: Any) -> Program:
    """The step on eight emulated devices, as the compile child does it."""
    case = make_step_case(plan or mesh_plan(), step, folder=folder, **values)
    return compile_here(case, open_case(case)).program
