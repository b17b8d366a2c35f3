"""A case, opened for compiling: its target, its mesh, and the step that `parallel` builds on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from jax.sharding import Mesh

from shardlab.compile.collect import Compiled, compile_lowered
from shardlab.compile.key import program_name
from shardlab.compile.mesh import fill_mesh
from shardlab.compile.own_step import compile_step_case
from shardlab.compile.target import Target, open_target
from shardlab.compile.versions import versions
from shardlab.hardware.catalog import load_machine
from shardlab.parallel.step import build_step
from shardlab.program import Program
from shardlab.spec.step import AnyCase, StepCase


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedCase:
    """What does not depend on the batch. device_ids: machine device id at each mesh position, row-major."""

    target: Target
    mesh: Mesh
    device_ids: tuple[int, ...]
    notes: tuple[str, ...]


def open_case(case: AnyCase) -> OpenedCase:
    """Open the target and fill the mesh. Raises UserError, TargetMissing or CompileFailed."""
    target = open_target(load_machine(case.machine))
    mesh, device_ids, notes = fill_mesh(case.plan.axes, case.plan.order, target)
    return OpenedCase(target=target, mesh=mesh, device_ids=device_ids, notes=notes)


def compile_here(
    case: AnyCase,
    opened: OpenedCase,
    kept: Callable[[str], Program | None] | None = None,
    before: Callable[[Program], None] | None = None,
) -> Compiled:
    """Build the case's step and compile it in this process, unless `kept` has it: as in `compile_lowered`.
    Raises UserError for what is wrong with the user's own step, which is compiled whatever is kept.

    before: gets what is known of a case's program when it is compiled next. Shapes only: nothing of the
    model's size is allocated. Raises Infeasible or CompileFailed.
    """
    target = opened.target
    template = Program(
        name=program_name(case),
        backend=target.family,
        hlo_text="",
        num_devices=len(target.devices),
        mesh=dict(case.plan.axes),
        device_ids=opened.device_ids,
        device_coords=target.coords,
        versions=versions(target.family),
        autotuned=target.autotuned,
        notes=opened.notes,
    )
    if isinstance(case, StepCase):
        return compile_step_case(case, opened.mesh, target.platform, template)
    step = build_step(case, opened.mesh, target=target.family)
    return compile_lowered(
        lambda: step.function.trace(*step.arguments).lower(lowering_platforms=(target.platform,)),
        replace(template, notes=(*opened.notes, *step.notes)),
        kept=kept,
        before=before,
    )
