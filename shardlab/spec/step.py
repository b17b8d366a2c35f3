"""The user's own step function, `--step package.module:make_step`: what it returns, and the case it makes.

    def make_step(mesh):                  # also asks for plan, batch, seq, model or workload, by these names
        …
        return jitted, (state, batch)     # one program, with abstract arguments

A step of several programs is a dict: name -> (jitted, arguments, runs per step):

        return {"accumulate": (accumulate, (params, sums, x), 16), "update": (update, (params, state, sums))}

or a list of `StepProgram`, which says the same with names. Imports no jax.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from shardlab.errors import Problem, UserError
from shardlab.hardware.catalog import load_machine
from shardlab.hardware.machine import Machine
from shardlab.spec.case import Case, Workload, machine_spec
from shardlab.spec.plan import Plan
from shardlab.spec.plan_checks import step_problems

ASKED = ("mesh", "plan", "batch", "seq", "model", "workload")
"""The names by which `make_step` asks for what it needs."""

_FORMS = "return (jitted, arguments), {name: (jitted, arguments, runs per step)} or a list of StepProgram"


@dataclass(frozen=True, slots=True)
class StepProgram:
    """One program of a step.

    fn: what `jax.jit` returned. args: its positional arguments, with `jax.ShapeDtypeStruct` for arrays, whose
    shardings are on the mesh that `make_step` was given. runs_per_step: 16 of what runs for each of sixteen
    microbatches.
    """

    name: str
    fn: Any
    args: Sequence[Any] = ()
    runs_per_step: int = 1


class StepCase(BaseModel):
    """The user's step on a plan's mesh and a machine: the other kind of `Case`.

    step: `package.module:make_step`. folder: where the package is looked for first (absolute). model, batch
    (sequences), seq (tokens): None where nobody gave any; handed over where `make_step` asks for them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    plan: Plan
    step: str
    folder: str
    machine: str
    model: str | None = None
    batch: int | None = None
    seq: int | None = None
    workload: Workload = "train"
    kind: Literal["step"] = "step"

    @property
    def subject(self) -> str:
        """What is compiled: `package.module:make_step`."""
        return self.step

    @property
    def work(self) -> tuple[object, ...]:
        """What cases that are compared must share."""
        return (self.step, self.model, self.batch, self.seq, self.workload)

    def load_machine(self) -> Machine:
        """The machine as a record."""
        return load_machine(self.machine)

    def values(self) -> dict[str, Any]:
        """What `make_step` may ask for beside the mesh; without what nobody gave."""
        known = {"plan": self.plan, "model": self.model, "batch": self.batch, "seq": self.seq}
        return {name: value for name, value in known.items() if value is not None} | {
            "workload": self.workload
        }


AnyCase = Case | StepCase


def make_step_case(
    plan: Plan,
    step: str,
    *,
    folder: str | Path = ".",
    machine: str | None = None,
    model: str | None = None,
    batch: int | None = None,
    seq: int | None = None,
    workload: Workload | None = None,
) -> StepCase:
    """The user's step on a plan; what is not given comes from the plan's `on` and `[check]`.

    Raises UserError with every mistake: a step that is no `module:function`, a machine that does not fit.
    """
    problems = list(step_problems(step))
    try:
        spec = machine_spec(plan, machine)
    except UserError as error:
        raise UserError(*problems, *error.problems) from None
    if problems:
        raise UserError(*problems)
    return StepCase(
        plan=plan,
        step=step,
        folder=str(Path(folder).resolve()),
        machine=spec,
        model=model or plan.check.model,
        batch=batch or plan.check.batch,
        seq=seq or plan.check.seq,
        workload=workload or plan.check.workload,
    )


def step_programs(returned: Any, step: str) -> tuple[StepProgram, ...]:
    """What `make_step` returned, whichever form it has. Raises UserError when it is none of the forms."""
    if isinstance(returned, StepProgram):
        found: Sequence[Any] = [returned]
    elif isinstance(returned, Mapping):
        found = [_named(str(name), value) for name, value in returned.items()]
    elif isinstance(returned, tuple) and returned and callable(returned[0]):
        found = [_named(str(getattr(returned[0], "__name__", "step")), returned)]
    else:
        found = list(returned) if isinstance(returned, list | tuple) else [None]
    wrong = [one for one in found if not _is_program(one)]
    if wrong or not found:
        what = (
            f"it returned {_described(returned)}" if not found or wrong == [None] else _described_all(wrong)
        )
        raise UserError(Problem(step, what, _FORMS))
    names = [one.name for one in found]
    if len(set(names)) < len(names):
        raise UserError(Problem(step, f"two programs of one name: {', '.join(names)}", "name them apart"))
    return tuple(found)


def _named(name: str, value: Any) -> Any:
    if isinstance(value, StepProgram):
        return StepProgram(name, value.fn, value.args, value.runs_per_step)
    if isinstance(value, tuple) and len(value) in (2, 3) and callable(value[0]):
        return StepProgram(name, *value)
    return None


def _is_program(one: Any) -> bool:
    return (
        isinstance(one, StepProgram)
        and isinstance(one.args, tuple | list)
        and type(one.runs_per_step) is int
        and one.runs_per_step > 0
    )


def _described(value: Any) -> str:
    if isinstance(value, tuple | list | Mapping):
        return f"a {type(value).__name__} of {len(value)}" if value else f"an empty {type(value).__name__}"
    return f"{type(value).__name__}"


def _described_all(wrong: Sequence[Any]) -> str:
    for one in wrong:
        if isinstance(one, StepProgram):
            if not isinstance(one.args, tuple | list):
                return f"the arguments of {one.name} are {type(one.args).__name__}, not a tuple"
            return f"runs_per_step of {one.name} is {one.runs_per_step!r}, not a whole number above 0"
    return f"it returned {_described(wrong[0])} where a program should be"
