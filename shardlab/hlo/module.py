"""The records that reading HLO gives: Module > Computation > Instruction > Shape. Pure values.

Text, dump text and proto readers all produce these, so that everything after them is written once.
Async sugar is kept as written (`all-gather-start`); `attribute/` gives it meaning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, eq=False)
class Shape:
    """An array, tuple, token or opaque shape.

    dtype: `bf16`, `f32`, …, or `tuple`, `token`, `opaque`.
    dims: extents of an array; a bounded dynamic extent holds its bound, an unbounded one (`?`) None.
    bounded: whether an extent was only a bound (`<=128`), so that `num_bytes` is an upper bound.
    element_bits: the layout's `E(n)`, or 0 when the layout does not pack.
    leaves: the elements of a tuple.
    """

    dtype: str
    dims: tuple[int | None, ...] = ()
    element_bits: int = 0
    bounded: bool = False
    memory_space: int = 0
    leaves: tuple[Shape, ...] = ()

    def __eq__(self, other: object) -> bool:
        """Without recursion: tuples nest as deep as a file likes."""
        if not isinstance(other, Shape):
            return NotImplemented
        pairs = [(self, other)]
        while pairs:
            one, two = pairs.pop()
            if one is two:
                continue
            if one._own() != two._own():
                return False
            pairs.extend(zip(one.leaves, two.leaves, strict=True))
        return True

    def __hash__(self) -> int:
        return hash(self._own())

    def _own(self) -> tuple[object, ...]:
        """All but the elements of a tuple, of which only the number."""
        own = (self.dtype, self.dims, self.element_bits, self.bounded, self.memory_space)
        return (*own, len(self.leaves))


@dataclass(frozen=True, slots=True)
class Operand:
    """A use of a value: the instruction's `name`, and the tuple `index` path of compact text (`%x#1#0`)."""

    name: str
    index: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Instruction:
    """One HLO instruction.

    attributes: raw text of each attribute by name (`replica_groups`, `metadata`, `backend_config`, …); values
    are
        parsed by whoever needs them. For `parameter`, `constant` and literals the text between the
        parentheses is in `literal`.
    line: 1-based line in the text, 0 when it came from a proto.
    """

    name: str
    opcode: str
    shape: Shape
    operands: tuple[Operand, ...] = ()
    attributes: Mapping[str, str] = field(default_factory=dict)
    literal: str | None = None
    is_root: bool = False
    line: int = 0


@dataclass(frozen=True, slots=True)
class Computation:
    """A named list of instructions in printed (for a scheduled module: executed) order."""

    name: str
    instructions: Mapping[str, Instruction]
    root: str
    execution_thread: str = ""


@dataclass(frozen=True, slots=True)
class SourceFrame:
    """One entry of the stack frame tables: file, line, function, and the parent frame's id (0: none)."""

    file: str
    line: int
    function: str
    parent: int


@dataclass(frozen=True, slots=True)
class Module:
    """A compiled HLO module.

    num_partitions, replica_count: None where the text does not say (older than November 2023).
    device_assignment: device ids in order of flattened id, where a proto records them.
    unparsed: what was skipped because it could not be read, as (line, text), for the ledger.
    """

    name: str
    entry: str
    computations: Mapping[str, Computation]
    num_partitions: int | None = None
    replica_count: int | None = None
    is_scheduled: bool = False
    stack_frames: Mapping[int, SourceFrame] = field(default_factory=dict)
    device_assignment: tuple[int, ...] | None = None
    unparsed: tuple[tuple[int, str], ...] = ()
