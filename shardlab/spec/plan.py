"""Mesh files: a plan as one frozen value. `load_plan` reads TOML and reports all mistakes at once."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from shardlab.errors import Problem, UserError
from shardlab.hardware.toml_file import read_text
from shardlab.spec import plan_checks as checks
from shardlab.spec.experts import experts_problems
from shardlab.spec.lora import lora_problems
from shardlab.spec.plan_checks import ACTIVATION_AXES, PARAM_AXES
from shardlab.spec.plan_file import PlanText, read_flags_file, read_plan_text
from shardlab.spec.plan_schema import BlockTable, Check, Method, PlanTable, RuleLists, read_table
from shardlab.spec.remat import remat_problems

__all__ = ["ACTIVATION_AXES", "PARAM_AXES", "Check", "Method", "Plan", "Rules", "load_plan", "plan_from_text"]

# Logical axis -> mesh axes, major to minor. A logical axis that is absent is replicated.
Rules = dict[str, tuple[str, ...]]

# Activations that are split as the weights are, unless the plan says otherwise.
FOLLOWS_PARAMS = ("heads", "kv_heads", "mlp", "vocab", "expert")


class Plan(BaseModel):
    """One mesh file. `axes` is ordered major to minor. `params`, `activations`, `optimizer` are complete:
    what follows from another table (heads of activations, optimizer from params, norm_seq from seq) has been
    filled in. gradients: where their sums are kept between microbatches; what it leaves out is as in params.
    blocks: by block family (`spec.sharding.BLOCK_ARRAYS`) its own `params` and `optimizer`, complete too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    path: str = ""
    description: str = ""
    on: str | None = None
    order: Literal["make_mesh", "row-major"] | tuple[int, ...] = "make_mesh"
    axes: dict[str, int]
    params: Rules = {}
    activations: Rules = {}
    gradients: Rules = {}
    optimizer: Rules = {}
    blocks: dict[str, dict[str, Rules]] = {}
    method: Method = Method()
    flags: tuple[str, ...] = ()
    check: Check = Check()

    @property
    def num_devices(self) -> int:
        """Devices of the logical mesh: the product of the axes."""
        return math.prod(self.axes.values())

    def params_in(self, block: str | None) -> Rules:
        """The rules of the parameters of one block family, or of what is in none."""
        return self.blocks[block]["params"] if block in self.blocks else self.params

    def optimizer_in(self, block: str | None) -> Rules:
        """Those of their optimizer state."""
        return self.blocks[block]["optimizer"] if block in self.blocks else self.optimizer

    @property
    def all_params(self) -> Rules:
        """For each logical axis every mesh axis that splits it in some block."""
        return _union(self.params, *(block["params"] for block in self.blocks.values()))

    @property
    def all_optimizer(self) -> Rules:
        """`all_params` of the optimizer state."""
        return _union(self.optimizer, *(block["optimizer"] for block in self.blocks.values()))


def load_plan(path: str | Path) -> Plan:
    """The mesh file at `path`. Raises UserError with every mistake in it, each with its line and key."""
    file = Path(path)
    return _plan(read_plan_text(read_text(file), str(file), file.parent), file.stem, file)


def plan_from_text(text: str, name: str = "plan", path: str | Path | None = None) -> Plan:
    """A mesh file's text to a plan; `path`: where it stands. Raises UserError with every mistake."""
    file = Path(path) if path is not None else None
    where = str(file) if file is not None else name
    return _plan(read_plan_text(text, where, file.parent if file is not None else None), name, file)


def _plan(text: PlanText, name: str, file: Path | None) -> Plan:
    """Everything that is wrong is found before anything is raised."""
    table, problems = read_table(text.table, text.locate)
    folder = file.parent if file is not None else None
    try:
        flags = _flags(table.compiler.flags, folder)
    except UserError as error:
        flags, problems = (), [*problems, *error.problems]
    plan = _filled_in(table, name, str(file) if file is not None else "", _resolved(table.on, folder), flags)
    problems = [*problems, *_problems(plan, table, text)]
    if problems:
        raise UserError(*sorted(problems, key=_line))
    return plan


def _filled_in(table: PlanTable, name: str, path: str, on: str | None, flags: tuple[str, ...]) -> Plan:
    """The plan, with what one table takes from another."""
    params = _tuples(table.params)
    activations = _tuples(table.activations)
    optimizer = params | _tuples(table.optimizer)
    blocks = {name: _block(block, params, optimizer) for name, block in table.blocks.items()}
    experts = blocks["moe"]["params"] if "moe" in blocks else params
    shapes = params | ({"expert": experts["expert"]} if "expert" in experts else {})
    follow = {axis: shapes[axis] for axis in FOLLOWS_PARAMS if axis in shapes}
    if "seq" in activations:
        follow["norm_seq"] = activations["seq"]
        if table.method.context != "none":
            follow["kv_seq"] = activations["seq"]
    return Plan(
        name=name,
        path=path,
        description=table.description,
        on=on,
        order=tuple(table.order) if isinstance(table.order, list) else table.order,
        axes=table.axes,
        params=params,
        activations=follow | activations,
        gradients=_tuples(table.gradients),
        optimizer=optimizer,
        blocks=blocks,
        method=table.method,
        flags=flags,
        check=table.check,
    )


def _problems(plan: Plan, table: PlanTable, text: PlanText) -> list[Problem]:
    """What is wrong between the keys, given those whose shape is right."""
    where = text.locate
    written = text.table.get("axes", {})
    problems: list[Problem] = []
    grid_known = False
    if isinstance(written, dict):  # else the shape was wrong, and nothing that names axes can be judged
        axes = checks.axes_problems(written, plan.axes, where)
        problems += [*axes, *checks.rules_problems(table, tuple(written), where)]
        grid_known = not axes and len(plan.axes) == len(written)
    if grid_known:
        problems += checks.order_problems(plan.order, plan.num_devices, where)
    if plan.on is not None:
        problems += checks.machine_problems(plan.on, plan.axes if grid_known else None, where)
    problems += checks.double_use_problems(plan.params, plan.activations, plan.optimizer, plan.blocks, where)
    problems += checks.zero_problems(plan.params, plan.gradients, plan.optimizer, where)
    problems += checks.blocks_problems(table, plan.blocks, where)
    problems += checks.method_problems(plan.method, where)
    problems += lora_problems(plan.method, where)
    problems += remat_problems(plan.method, where)
    problems += checks.pipeline_problems(plan.params, plan.activations, plan.method, where)
    problems += experts_problems(plan.params_in("moe"), plan.activations, plan.method, where)
    problems += checks.context_problems(plan.activations, plan.method, where)
    problems += checks.flags_problems(plan.flags, where)
    return problems + checks.check_problems(plan.check, where)


def _line(problem: Problem) -> int:
    """The line that a problem's `file:line: key` names; 0 where it names none."""
    match = re.search(r":(\d+)(?:: |$)", problem.where)
    return int(match[1]) if match else 0


def _flags(flags: list[str] | str, folder: Path | None) -> tuple[str, ...]:
    """The flags themselves, read from their file where the plan gives a path."""
    if isinstance(flags, str):
        return read_flags_file((folder or Path()) / flags)
    return tuple(flags)


def _resolved(on: str | None, folder: Path | None) -> str | None:
    """A machine file is looked for beside the plan."""
    if on is None or folder is None or not on.partition(":")[0].endswith(".toml"):
        return on
    return str(folder / on)


def _block(block: BlockTable, params: Rules, optimizer: Rules) -> dict[str, Rules]:
    """A block family's complete rules. Its optimizer state follows its own parameters, then [optimizer]."""
    own = _tuples(block.params)
    return {"params": params | own, "optimizer": optimizer | own | _tuples(block.optimizer)}


def _union(*tables: Rules) -> Rules:
    """For each logical axis the mesh axes of all tables, each once."""
    names = dict.fromkeys(axis for table in tables for axis in table)
    return {
        axis: tuple(dict.fromkeys(name for table in tables for name in table.get(axis, ()))) for axis in names
    }


def _tuples(rules: RuleLists) -> Rules:
    return {axis: tuple(split) for axis, split in rules.items()}
