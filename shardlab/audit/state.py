"""A rule about what the program is given: a large argument that is whole where the others are split.

Only a saved Program says how its arguments are split (compiled text of JAX 0.11 and later does not), so a
dump alone is not judged. Nor are arrays that the program makes for itself: what they were before they were
partitioned is nowhere in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

from shardlab.audit.findings import Audited, Finding
from shardlab.hlo.attributes import metadata, parameter_number
from shardlab.hlo.lookup import of_opcodes
from shardlab.hlo.module import Instruction
from shardlab.program import Argument
from shardlab.units import format_bytes

LARGE_BYTES = 1 << 20
LARGE_SHARE = Fraction(1, 100)
MOST = Fraction(1, 2)


def replicated(audited: Audited) -> Iterator[Finding]:
    """Large arguments that are the same along an axis over which most of the bytes of the others are split.

    Large: 1 MiB per device, and a hundredth of what the device is given. That it is the plan's own choice
    (ZeRO-1 keeps whole parameters beside split moments) cannot be told from a mistake.
    """
    program = audited.program
    arguments = (program.arguments if program else None) or ()
    mesh = (program.mesh if program else None) or {}
    least = max(Fraction(LARGE_BYTES), LARGE_SHARE * sum(one.device_bytes for one in arguments))
    left: dict[tuple[str, ...], list[int]] = {}
    for i, argument in enumerate(arguments):
        axes = _left_out(argument, arguments, mesh) if argument.device_bytes >= least else ()
        if axes:
            left.setdefault(axes, []).append(i)
    given = _parameters(audited, len(arguments))
    for axes, indices in left.items():
        indices.sort(key=lambda i: -arguments[i].device_bytes)
        yield _finding(
            axes,
            math.prod(mesh[axis] for axis in axes),
            [arguments[i] for i in indices],
            given.get(indices[0]),
        )


def _left_out(argument: Argument, arguments: Sequence[Argument], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Axes that do not split this argument, but most bytes of the others."""
    others = sum(one.total_bytes for one in arguments) - argument.total_bytes
    split = {
        axis: sum(one.total_bytes for one in arguments if axis in one.split_over)
        for axis, size in mesh.items()
        if size > 1 and axis not in argument.split_over
    }
    return tuple(axis for axis, split_bytes in split.items() if others and split_bytes >= MOST * others)


def _parameters(audited: Audited, count: int) -> dict[int, Instruction]:
    """The parameters of the program by argument; none when some arguments are not passed on."""
    entry = audited.module.computations[audited.module.entry].instructions
    found = {parameter_number(one): one for one in of_opcodes(entry, ("parameter",))}
    return found if len(found) == count else {}


def _finding(
    axes: tuple[str, ...], ways: int, arguments: Sequence[Argument], parameter: Instruction | None
) -> Finding:
    """arguments: those that these axes, of so many devices, leave whole; the largest first."""
    largest, *others = arguments
    name = (metadata(parameter).op_name if parameter else "") or largest.path
    size_bytes = sum(one.device_bytes for one in arguments)
    more = f" and {len(others)} more ({format_bytes(size_bytes)} in all) are" if others else " is"
    over = " and ".join(axes)
    return Finding(
        rule="replicated",
        instruction=parameter.name if parameter else largest.path,
        axes=axes,
        wire_bytes=None,
        source="",
        evidence=f"{name}, {format_bytes(largest.device_bytes)} per device,{more} the same on all {ways} "
        f"devices of {over}, while most bytes of the other arguments are split over {over}.",
        remedy=f"Split one of their dimensions over {over}: a rule in [params] or [optimizer] of the mesh "
        "file, or the sharding of the argument. ZeRO-1 leaves parameters whole by choice.",
        memory_bytes=size_bytes - -(-size_bytes // ways),
    )
