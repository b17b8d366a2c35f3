"""The audit: every rule over one module, in a fixed order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Final

from shardlab.analysis import Analysis, Attributed
from shardlab.attribute.calls import call_graph
from shardlab.attribute.chains import Chains
from shardlab.attribute.collectives import Collective, find_collectives
from shardlab.audit.findings import Audited, Finding
from shardlab.audit.flow import Flow
from shardlab.audit.gathers import gathered_every_trip, gathered_then_sliced, gathered_twice, gathered_wide
from shardlab.audit.reductions import gathered_by_reduction, reduced_then_sliced
from shardlab.audit.warned import rematerialized
from shardlab.hlo.module import Module
from shardlab.program import Program

Rule = Callable[[Audited], Iterator[Finding]]

RULES: Final[tuple[Rule, ...]] = (
    gathered_wide,
    gathered_twice,
    gathered_then_sliced,
    gathered_every_trip,
    gathered_by_reduction,
    reduced_then_sliced,
    rematerialized,
)
"""In the order in which findings are listed. A rule that cannot be decided from the program says nothing."""


def audit(module: Module, analysis: Analysis, program: Program | None = None) -> tuple[Finding, ...]:
    """What could be saved in `module`, whose analysis is `analysis`; `program` adds the compiler's warnings.

    Raises ValueError when the analysis is of another module.
    """
    graph = call_graph(module)
    backend = analysis.modules[0].backend
    found = [one for one in find_collectives(module, graph.sites, backend) if isinstance(one, Collective)]
    if [one.name for one in found] != [row.name for row in analysis.collectives]:
        raise ValueError(f"the analysis is not of module {module.name}")
    audited = Audited(
        module=module,
        graph=graph,
        flow=Flow(module, graph.sites),
        items=tuple(zip(found, analysis.collectives, strict=True)),
        backend=backend,
        chains=Chains(module),
        program=program,
    )
    return tuple(finding for rule in RULES for finding in rule(audited))


def audit_parts(parts: Sequence[Attributed]) -> tuple[Finding, ...]:
    """The findings of every module; where there are several, each finding names its own."""
    return tuple(
        replace(one, module=part.module.name if len(parts) > 1 else None)
        for part in parts
        for one in audit(part.module, part.analysis, part.program)
    )
