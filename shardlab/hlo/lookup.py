"""Questions to the instructions of a computation that are answered without reading all of them.

Text keeps an index (`Instructions`); the records of a proto are looked through.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from shardlab.hlo.attributes import computation_names
from shardlab.hlo.instructions import Instructions
from shardlab.hlo.module import Instruction, Shape
from shardlab.hlo.opcodes import PLAIN


def of_opcodes(instructions: Mapping[str, Instruction], opcodes: Collection[str]) -> list[Instruction]:
    """The instructions with one of these opcodes, in printed order.

    Reads nothing else when `instructions` is an `Instructions`, which keeps an index.
    """
    if isinstance(instructions, Instructions):
        if instructions.is_plain and PLAIN.isdisjoint(opcodes):
            return []
        lists = [instructions.opcodes[opcode] for opcode in opcodes if opcode in instructions.opcodes]
        found = [instructions[name] for names in lists for name in names]
        return found if len(lists) < 2 else sorted(found, key=lambda instruction: instruction.line)
    wanted = set(opcodes)
    return [instruction for instruction in instructions.values() if instruction.opcode in wanted]


def fusions(instructions: Mapping[str, Instruction]) -> Iterator[tuple[str, str]]:
    """Each fusion's name and the computation that it calls, without reading it where its line tells."""
    known = instructions.callees if isinstance(instructions, Instructions) else {}
    for name in names_of(instructions, "fusion"):
        if name in known:
            yield name, known[name]
        else:
            yield from ((name, callee) for callee in computation_names(instructions[name], "calls"))


def names_of(instructions: Mapping[str, Instruction], opcode: str) -> Sequence[str]:
    """The names of the instructions with an opcode, in printed order."""
    if isinstance(instructions, Instructions):
        return instructions.opcodes.get(opcode, ())
    return [instruction.name for instruction in instructions.values() if instruction.opcode == opcode]


def operand_names(instructions: Mapping[str, Instruction]) -> dict[str, list[str]]:
    """Of each instruction the names of its operands, without reading whole instructions where lines tell."""
    found = instructions.printed_operands() if isinstance(instructions, Instructions) else {}
    for name in instructions:
        if name not in found:
            found[name] = [operand.name for operand in instructions[name].operands]
    return found


def shape_of(instructions: Mapping[str, Instruction], name: str) -> Shape | None:
    """The shape of one, without reading all of it where its line tells; None if it is not there."""
    shape = instructions.printed_shape(name) if isinstance(instructions, Instructions) else None
    if shape is None and name in instructions:
        return instructions[name].shape
    return shape


def raw_metadata(instructions: Mapping[str, Instruction], name: str) -> str:
    """The text of an instruction's metadata, without reading all of it where its line tells."""
    raw = instructions.printed_metadata(name) if isinstance(instructions, Instructions) else None
    return instructions[name].attributes.get("metadata", "") if raw is None else raw


def is_plain(instructions: Mapping[str, Instruction]) -> bool:
    """Whether none of them runs a computation or moves data between devices."""
    if isinstance(instructions, Instructions):
        return instructions.is_plain
    return all(instruction.opcode in PLAIN for instruction in instructions.values())


def active(instructions: Mapping[str, Instruction]) -> Iterator[Instruction]:
    """Those that may run a computation or move data between devices, by opcode."""
    if not isinstance(instructions, Instructions):
        yield from (instruction for instruction in instructions.values() if instruction.opcode not in PLAIN)
    elif not instructions.is_plain:
        for opcode, names in instructions.opcodes.items():
            if opcode not in PLAIN:
                yield from map(instructions.__getitem__, names)


def may_mention(instructions: Mapping[str, Instruction], text: str) -> bool:
    """False only if no instruction holds `text` as it is printed."""
    return not isinstance(instructions, Instructions) or instructions.mentions(text)
