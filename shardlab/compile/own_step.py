"""The user's own step, in the compile child: `make_step` is imported, called, traced and compiled.

What goes wrong in the user's code is their mistake to see: one line with the place in their file, no
traceback.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from shardlab.compile.collect import Compiled, compile_lowered
from shardlab.errors import Problem, ShardlabError, UserError
from shardlab.program import Program
from shardlab.spec.step import ASKED, StepCase, StepProgram, step_programs

_PACKAGE = Path(__file__).parents[1]
_MESH_LINE = re.compile(r"sdy\.mesh @\S+ = .*")
_COUNT = re.compile(r"\b(num_partitions|replica_count)=(\d+)")
_PLACE = "put NamedSharding(mesh, …) on its arguments, or give jax.jit in_shardings"
MAX_LISTED = 3


def compile_step_case(case: StepCase, mesh: Mesh, platform: str, template: Program) -> Compiled:
    """Every program that `make_step` returns, compiled: the first, with the others in its `then`.

    Of programs that do not all fit, the one that the compiler refused. Raises UserError for what is wrong
    with the user's function or in it, CompileFailed as `compile_lowered`.
    """
    made, given = call_make_step(case, mesh)
    problems = [problem for one in made for problem in _argument_problems(one, case.step)]
    if problems:
        raise UserError(*problems)
    compiled = []
    for one in made:
        named = replace(template, name=one.name, runs_per_step=one.runs_per_step)
        compiled.append(_compiled(one, case, mesh, platform, named))
        if compiled[-1].program.refusal is not None:
            return compiled[-1]
    unsplit = frozenset.intersection(*(one.unsplit for one in compiled))
    if unsplit and unsplit == _larger(mesh):
        axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        raise UserError(Problem(case.step, f"nothing in it is split over the mesh, {axes}", _PLACE))
    first, others = compiled[0], compiled[1:]
    program = replace(
        first.program,
        then=tuple(other.program for other in others),
        notes=(*template.notes, *_unused(case, given), *_unsplit(unsplit, mesh)),
        given={name: value for name, value in given.items() if isinstance(value, str | int)},
        compile_s=sum(one.program.compile_s or 0.0 for one in compiled),
    )
    return Compiled(program=program, executable=first.executable)


def call_make_step(case: StepCase, mesh: Mesh) -> tuple[tuple[StepProgram, ...], dict[str, Any]]:
    """The programs, and what `make_step` was given, by name. Raises UserError."""
    make_step = _imported(case)
    known = {"mesh": mesh, **case.values()}
    given, missing = {}, []
    parameters = inspect.signature(make_step).parameters
    for name, parameter in parameters.items():
        if name in known:
            given[name] = known[name]
        elif parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            missing.append(_missing(name, case.step))
    if missing:
        raise UserError(*missing)
    with _mistakes_of(case):
        returned = make_step(**given)
    return step_programs(returned, case.step), given


def _missing(name: str, step: str) -> Problem:
    if name in ASKED:
        return Problem(step, f"it asks for {name}, which nobody gave", f"give --{name}, or a default")
    fix = f"ask for {', '.join(ASKED)}, or give a default"
    return Problem(step, f"it asks for {name!r}, which shardlab does not know", fix)


def _imported(case: StepCase) -> Any:
    module_name, _, name = case.step.partition(":")
    # Behind everything that is imported here already, before everything installed: as `python -m` has it.
    sys.path.insert(0, case.folder)
    parts = module_name.split(".")
    with _mistakes_of(case):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name not in {".".join(parts[:end]) for end in range(1, len(parts) + 1)}:
                raise
            what = f"no module {error.name!r} in {case.folder} or among what is installed"
            fix = "run it where `import` finds it, or set PYTHONPATH"
            raise UserError(Problem(case.step, what, fix)) from None
    found = getattr(module, name, None)
    if not callable(found):
        what = f"{module_name} has no function {name!r}"
        near = [one for one in dir(module) if callable(getattr(module, one)) and one.startswith("make")]
        raise UserError(Problem(case.step, what, f"it has {', '.join(near)}" if near else "look at its name"))
    return found


@contextmanager
def _mistakes_of(case: StepCase) -> Iterator[None]:
    """What the user's code raises becomes a UserError that points into it."""
    try:
        yield
    except ShardlabError:
        raise
    except (Exception, SystemExit) as error:
        message = " ".join(str(error).split())
        what = f"{type(error).__name__}: {message[:500]}" if message else type(error).__name__
        raise UserError(Problem(_place(error, case), what, "")) from None


def _place(error: BaseException, case: StepCase) -> str:
    """`train/step.py:12 (make_step)`: the last of the user's own lines; else the step's name."""
    folder = Path(case.folder)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        theirs = path.is_relative_to(folder) and "site-packages" not in path.parts
        if theirs and not path.is_relative_to(_PACKAGE):
            return f"{path.relative_to(folder)}:{frame.lineno} ({frame.name})"
    return case.step


def _argument_problems(one: StepProgram, step: str) -> list[Problem]:
    """A function that is not jitted, and arguments that hold data: there is no memory for it here."""
    if not hasattr(one.fn, "trace") or not hasattr(one.fn, "lower"):
        return [Problem(step, f"{one.name} is not jitted", "return what jax.jit(…) made")]
    leaves = jax.tree_util.tree_flatten_with_path(tuple(one.args))[0]
    real = [(path, leaf) for path, leaf in leaves if isinstance(leaf, jax.Array | np.ndarray)]
    fix = "give jax.ShapeDtypeStruct with a sharding; jax.eval_shape(make_state) makes the structs"
    problems = [
        Problem(step, f"{one.name}: args{jax.tree_util.keystr(path)} is an array of {_type_of(leaf)}", fix)
        for path, leaf in real[:MAX_LISTED]
    ]
    if len(real) > MAX_LISTED:
        problems.append(Problem(step, f"{one.name}: {len(real) - MAX_LISTED} more arrays", fix))
    return problems


def _type_of(leaf: Any) -> str:
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _compiled(one: StepProgram, case: StepCase, mesh: Mesh, platform: str, template: Program) -> Compiled:
    lowered: Any = None

    def lower() -> Any:
        nonlocal lowered
        with _mistakes_of(case):
            lowered = one.fn.trace(*one.args).lower(lowering_platforms=(platform,))
        return lowered

    compiled = compile_lowered(lower, template)
    if compiled.executable is None:
        return compiled
    unsplit = _unsplit_axes(lowered.as_text(), mesh)
    _check_devices(one, case, mesh, compiled)
    return replace(compiled, unsplit=unsplit)


def _larger(mesh: Mesh) -> frozenset[str]:
    return frozenset(axis for axis, size in mesh.shape.items() if size > 1)


def _unsplit_axes(text: str, mesh: Mesh) -> frozenset[str]:
    """Axes that the lowered program's shardings never name. Without Shardy's dialect nothing is known."""
    if "sdy.mesh" not in text:
        return _larger(mesh) if "sharding" not in text else frozenset()
    rest = _MESH_LINE.sub("", text)
    return frozenset(axis for axis in _larger(mesh) if f'"{axis}"' not in rest)


def _check_devices(one: StepProgram, case: StepCase, mesh: Mesh, compiled: Compiled) -> None:
    """The program is for the mesh that `make_step` was given: all of its devices, in its order."""
    head = compiled.program.hlo_text.partition("\n")[0]
    devices = math.prod(int(count) for _, count in _COUNT.findall(head))
    if devices != mesh.size:
        what = f"{one.name} runs on {devices} of {mesh.size} devices"
        raise UserError(Problem(case.step, what, _PLACE if devices == 1 else "use the whole mesh"))
    own = [device.id for device in mesh.devices.flat]
    assert compiled.executable is not None
    for sharding in jax.tree.leaves(
        (compiled.executable.input_shardings, compiled.executable.output_shardings)
    ):
        used = getattr(sharding, "mesh", None) if isinstance(sharding, NamedSharding) else None
        if isinstance(used, Mesh) and [device.id for device in used.devices.flat] != own:
            what = f"{one.name} uses a mesh whose devices are in another order"
            raise UserError(
                Problem(case.step, what, "build it from the devices of the mesh that it is given")
            )


def _unsplit(axes: frozenset[str], mesh: Mesh) -> tuple[str, ...]:
    """Axes that no program of the step splits anything over."""
    return tuple(
        f"nothing is split over {axis} {size}: its devices repeat each other's work"
        for axis, size in mesh.shape.items()
        if axis in axes
    )


def _unused(case: StepCase, given: Mapping[str, Any]) -> tuple[str, ...]:
    """What the plan or the command line says and `make_step` did not ask for."""
    notes = []
    plan = case.plan
    rules = [
        name
        for name, table in (
            ("params", plan.params),
            ("activations", plan.activations),
            ("gradients", plan.gradients),
            ("optimizer", {axis: to for axis, to in plan.optimizer.items() if plan.params.get(axis) != to}),
            ("blocks", plan.blocks),
            ("method", plan.method.model_dump(exclude_defaults=True)),
        )
        if table
    ]
    if rules and "plan" not in given:
        tables = ", ".join(f"[{name}]" for name in rules)
        notes.append(f"{tables} of the plan are not used: {case.step} does not ask for plan")
    values = {name: value for name, value in case.values().items() if name not in ("plan", "workload")}
    idle = [f"{name} {value}" for name, value in values.items() if name not in given]
    if idle:
        notes.append(f"{', '.join(idle)}: not used, {case.step} does not ask for it")
    return tuple(notes)
