"""Cases compiled for their own targets, without what takes long and comes after all that the tests read."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Literal

from shardlab.compile import compile_case
from shardlab.hardware.catalog import load_machine
from shardlab.program import Program
from shardlab.spec.case import Case, make_case
from shardlab.spec.plan import load_plan
from shardlab.spec.step import AnyCase

Remat = Literal["none", "full"]
# Neither changes what an instruction computes or moves (`test_compile_case.py`). Tests of the commands and of
# compiling itself do without.
QUICK = {
    "cpu": ("--xla_backend_optimization_level=0",),  # of LLVM
    "gpu": ("--xla_gpu_autotune_level=0",),  # candidates for each fusion, none of which can be timed here
}
MESHES = Path(__file__).parents[1] / "meshes"


def compiled_plan(
    name: str, *, remat: Remat | None = None, model: str | None = None, batch: int | None = None
) -> tuple[Case, Program, bytes]:
    """The case of meshes/NAME.toml, its program and serialized module. What is given replaces the plan's."""
    return _compiled(name, remat, model, batch)


@functools.lru_cache(maxsize=8)
def _compiled(
    name: str, remat: Remat | None, model: str | None, batch: int | None
) -> tuple[Case, Program, bytes]:
    plan = load_plan(MESHES / f"{name}.toml")
    if remat is not None:
        plan = plan.model_copy(update={"method": plan.method.model_copy(update={"remat": remat})})
    case = make_case(plan, model=model, batch=batch)
    return case, *compiled_case(case)


def quick(case: AnyCase) -> AnyCase:
    """The case with flags for its target that save time."""
    flags = QUICK.get(load_machine(case.machine).family, ())
    return case.model_copy(
        update={"plan": case.plan.model_copy(update={"flags": (*case.plan.flags, *flags)})}
    )


def scheduled_case(case: AnyCase) -> Program:
    """The program; of a TPU's no more than its schedule, and so without memory."""
    return compile_case(quick(case), find_largest_batch=False, scheduled_only=True)


def compiled_case(case: Case) -> tuple[Program, bytes]:
    """The program and its serialized module, which is empty where the compiler refused."""
    with tempfile.TemporaryDirectory() as folder:
        proto = Path(folder) / "module.pb"
        program = compile_case(quick(case), proto_to=proto, find_largest_batch=False)
        return program, proto.read_bytes() if proto.exists() else b""
