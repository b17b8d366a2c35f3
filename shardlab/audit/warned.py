"""What the compiler itself warned of, joined to the gathers that came of it."""

from __future__ import annotations

from collections.abc import Iterator

from shardlab.audit.findings import Audited, Finding, per_step, together
from shardlab.hlo.attributes import metadata

KIND = "involuntary full rematerialization"


def rematerialized(audited: Audited) -> Iterator[Finding]:
    """The partitioner replicated an array to go from one sharding to another.

    The warning names an operation of the program before partitioning; the gathers that came of it carry its
    op_name.
    """
    for warning in audited.program.warnings if audited.program else ():
        if warning.kind != KIND or len(warning.names) < 3:
            continue
        operation, *op_names, before, after = warning.names
        gathers = [
            row for one, row in audited.of_kind("all-gather") if metadata(one.instruction).op_name in op_names
        ]
        names = ", ".join(row.name for row in gathers)
        yield Finding(
            rule="rematerialized",
            instruction=gathers[0].name if gathers else operation,
            axes=gathers[0].axes if gathers else None,
            wire_bytes=together(per_step(row, row.wire_bytes) for row in gathers) if gathers else None,
            source=gathers[0].source if gathers else "",
            evidence=f"the compiler could not go from sharding {before} to {after} at {operation} "
            f"and replicated the array{f', with {names}' if names else ''}.",
            remedy="Make the two shardings agree: constrain the array to one of them before this operation, "
            "or go there over a sharding that splits the same dimension.",
        )
