"""Stages 3 + 4 + 5 on one program: read the HLO, attribute each collective, cost it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from shardlab.analysis.records import Analysis, LedgerEntry, ModuleFacts
from shardlab.analysis.rows import Rows, row_times
from shardlab.analysis.totals import sum_totals, totals_of, totals_times
from shardlab.attribute.backend import backend_of
from shardlab.attribute.calls import CallGraph, call_graph
from shardlab.attribute.collectives import Collective, Uncounted, find_collectives
from shardlab.attribute.members import Members, Placement, place
from shardlab.attribute.origin import is_training
from shardlab.errors import ParseError, Problem, UserError
from shardlab.hardware.machine import Machine
from shardlab.hlo.collector import paused_collector
from shardlab.hlo.inputs import Source as HloSource
from shardlab.hlo.inputs import read_bytes, read_sources
from shardlab.hlo.module import Module
from shardlab.hlo.reader import parse
from shardlab.program import Flags, Program

Source = str | bytes | Path | Program | Module


@dataclass(frozen=True, slots=True, kw_only=True)
class Attributed:
    """One module's analysis with what it was made from, so that it can be priced again without reading.

    members, collectives: of each of `analysis.collectives`, the mesh positions that it joins (equal ones are
    one object) and how the program holds it. computations: that run them. device_ids: the device at each
    mesh position, None where nothing says (then the device of the same number). program: the saved program
    it came in.
    """

    analysis: Analysis
    module: Module
    program: Program | None
    graph: CallGraph
    members: tuple[Members, ...]
    computations: tuple[str, ...]
    collectives: tuple[Collective, ...]
    placement: Placement
    device_ids: tuple[int, ...] | None

    @property
    def runs_per_step(self) -> int:
        """How often a step runs the program: once unless it was saved with another number."""
        return self.program.runs_per_step if self.program is not None else 1

    @property
    def per_step(self) -> Analysis:
        """The analysis of all runs in a step; `analysis` is of one run."""
        return times(self.analysis, self.runs_per_step)


def analyze(
    source: Source | Sequence[Source],
    axes: Mapping[str, int] | None = None,
    device_ids: Sequence[int] | None = None,
    machine: Machine | None = None,
) -> Analysis:
    """What a compiled program communicates, per collective and in total.

    source: HLO text, a path or bytes (text, proto, either compressed, a saved program), a Program or a
    Module; or several of these.
    axes: mesh axis -> size, major to minor; device_ids: the device at each position, row-major; both are a
    Program's own unless given. machine: adds traffic per link tier, and time.
    Raises ParseError when the source is not HLO, UserError when axes, device ids or machine do not fit it.
    """
    return merge([part.per_step for part in attribute(source, axes, device_ids, machine)])


def attribute(
    source: Source | Sequence[Source],
    axes: Mapping[str, int] | None = None,
    device_ids: Sequence[int] | None = None,
    machine: Machine | None = None,
) -> Iterator[Attributed]:
    """Module by module, the analysis and what it was made from; arguments and errors as for `analyze`."""
    for name, module, made in _modules_of(source):
        try:
            with paused_collector():
                attributed = _attribute_module(module, made, axes, device_ids, machine)
        except ParseError as error:
            raise ParseError(error.message, source=name, line=error.line, column=error.column) from None
        yield attributed


def times(analysis: Analysis, runs: int) -> Analysis:
    """An analysis of one run as one of `runs` runs: executions and totals are multiplied, bytes of one
    execution stay."""
    if runs == 1:
        return analysis
    return replace(
        analysis,
        modules=tuple(replace(facts, runs_per_step=facts.runs_per_step * runs) for facts in analysis.modules),
        collectives=tuple(map(partial(row_times, runs=runs), analysis.collectives)),
        totals=totals_times(analysis.totals, runs),
    )


def merge(analyses: Sequence[Analysis]) -> Analysis:
    """Several analyses as one document: rows name their module, totals are sums; one analysis is itself.

    Raises ValueError for none.
    """
    if not analyses:
        raise ValueError("nothing to merge")
    if len(analyses) == 1:
        return analyses[0]
    rows = tuple(
        replace(row, module=row.module or part.modules[0].name)
        for part in analyses
        for row in part.collectives
    )
    meshes = [part.mesh for part in analyses]
    return Analysis(
        modules=tuple(facts for part in analyses for facts in part.modules),
        mesh=meshes[0] if all(mesh == meshes[0] for mesh in meshes) else None,
        machine=analyses[0].machine,
        collectives=rows,
        totals=sum_totals([part.totals for part in analyses]),
        ledger=tuple(entry for part in analyses for entry in part.ledger),
        made_by=analyses[0].made_by,
    )


def _modules_of(source: Source | Sequence[Source]) -> Iterator[tuple[str, Module, Program | None]]:
    """Modules with the name of what they were read from, and the saved program if it was one."""
    if isinstance(source, Module):
        yield source.name, source, None
    elif isinstance(source, Program):
        modules = parse(source.hlo_text, source.name) if source.hlo_text.strip() else ()
        yield from _of_file(HloSource(name=source.name, modules=modules, program=source))
    elif isinstance(source, bytes):
        yield from _of_file(read_bytes(source))
    elif isinstance(source, str) and source.startswith("HloModule"):
        yield from _of_file(HloSource(name="<hlo>", modules=parse(source)))
    elif isinstance(source, str) and (not source.strip() or "\n" in source):
        yield from _of_file(read_bytes(source.encode("utf-8", "replace"), "<hlo>"))
    elif isinstance(source, str | Path):
        for found in read_sources(source):
            yield from _of_file(found)
    else:
        for one in source:
            yield from _modules_of(one)


def _of_file(found: HloSource) -> Iterator[tuple[str, Module, Program | None]]:
    if not found.modules:
        what = "it holds no compiled program, since the compiler refused it"
        raise UserError(Problem(found.name, what, "analyse a plan that fits in memory"))
    for module in found.modules:
        yield found.name, module, found.program
    for other in found.program.then if found.program is not None else ():
        yield from ((found.name, module, other) for module in parse(other.hlo_text, found.name))


def _attribute_module(
    module: Module,
    program: Program | None,
    axes: Mapping[str, int] | None,
    device_ids: Sequence[int] | None,
    machine: Machine | None,
) -> Attributed:
    mesh = axes if axes is not None else program.mesh if program else None
    if device_ids is None and program is not None:
        device_ids = program.device_ids  # other axes over the same devices leave them where they are
    graph = call_graph(module, plain=False)
    backend = program.backend if program else backend_of(module, graph.sites.order)
    found = find_collectives(module, graph.sites, backend)
    collectives = [item for item in found if isinstance(item, Collective)]
    if device_ids is None and program is None and mesh is not None:
        # A proto records which device stands at each position; of a multi-slice program, for one slice only.
        recorded = module.device_assignment or ()
        device_ids = recorded if len(recorded) == math.prod(mesh.values()) else None
    placement = place(module, mesh, device_ids, [c.instruction for c in collectives if c.target is None])
    rows = Rows(module, graph, mesh, device_ids, machine, placement, is_training(module, graph.sites.order))
    realized = rows.realized(collectives)
    built = [rows.row(one, realized.get((one.computation, one.instruction.name))) for one in collectives]
    ledger = [LedgerEntry(what=u.what, name=u.name, why=u.why) for u in found if isinstance(u, Uncounted)]
    ledger += rows.notes(collectives, built)
    if program is not None:
        ledger += [LedgerEntry(what="program", name=name, why=why) for name, why in program.left_out]
    facts = ModuleFacts(
        name=module.name, backend=backend, num_devices=placement.num_devices, scheduled=module.is_scheduled
    )
    analysis = Analysis(
        modules=(facts,),
        mesh=mesh,
        machine=machine.spec if machine else None,
        collectives=tuple(built),
        totals=totals_of(graph, zip((c.computation for c in collectives), built, strict=True)),
        ledger=tuple(dict.fromkeys(ledger)),
        made_by=_made_by(program, device_ids),
    )
    return Attributed(
        analysis=analysis,
        module=module,
        program=program,
        graph=graph,
        members=tuple(rows.members(collective) for collective in collectives),
        computations=tuple(collective.computation for collective in collectives),
        collectives=tuple(collectives),
        placement=placement,
        device_ids=None if device_ids is None else tuple(device_ids),
    )


def _made_by(program: Program | None, device_ids: Sequence[int] | None) -> dict[str, object]:
    """What made the program, as far as it is known."""
    made: dict[str, object] = {}
    if device_ids is not None:
        in_order = all(device == position for position, device in enumerate(device_ids))
        made["device_order"] = "row-major" if in_order else list(device_ids)
    if program is None:
        return made
    flags = program.flags
    asked = {
        "requested": list(flags.requested),
        "effective": list(flags.effective),
        "rejected": [list(pair) for pair in flags.rejected],
    }
    made = {"versions": dict(program.versions), "flags": "stock" if flags == Flags() else asked, **made}
    return made if program.autotuned is None else {**made, "autotuned": program.autotuned}
