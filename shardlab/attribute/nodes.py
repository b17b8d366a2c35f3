"""What integer arithmetic is followed to: a flat list of nodes, each made from earlier ones."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass

from shardlab.attribute.arithmetic import BITS, COMPARISONS, OPERAND_COUNTS, OPERATIONS, undefined, wrap
from shardlab.hlo.module import Computation, Instruction, Operand, Shape

Path = tuple[int, ...]
LoopKey = tuple[str, str]  # computation and name of a while

SAME_VALUE = frozenset({"copy", "bitcast", "reshape", "broadcast", "transpose", "opt-barrier", "convert"})
ELEMENTWISE = frozenset({*OPERATIONS, "convert", "compare"})
DEVICE_NUMBERS = frozenset({"partition-id", "replica-id"})


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """A constant array of integers, row-major."""

    values: tuple[int, ...]
    dims: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Node:
    """One scalar. op: `constant`, `state`, `lookup`, `partition-id`, `replica-id`, `unknown`, or the HLO
    opcode applied to `args` (earlier nodes).

    value: of a constant. loop, path: of a state, which element of which loop's tuple. table: what a lookup
    reads, at the indices `args`. note: a comparison's direction, or why a node is unknown.
    """

    op: str
    dtype: str
    args: tuple[int, ...] = ()
    value: int = 0
    loop: LoopKey | None = None
    path: Path = ()
    note: str = ""
    table: Table | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """A computation in a context: what its parameters stand for.

    loop: parameters are this loop's state; `caller` is then where the loop stands. Otherwise, with a caller,
    parameters are the operands of that call. Neither: they are looked up at the computation's own call
    sites.
    """

    computation: Computation
    caller: Frame | None = None
    operands: tuple[Operand, ...] = ()
    loop: LoopKey | None = None


@dataclass(frozen=True, slots=True)
class Ref:
    """Element `path` of the value of instruction `name`, seen in `frame`; of an array, its element at the
    index nodes `at`, or the array as a whole when there are none.
    """

    frame: Frame
    name: str
    path: Path = ()
    at: tuple[int, ...] = ()


Steps = Generator[Ref, int, int]


class Nodes(list[Node]):
    """The nodes found so far. tables: by (computation, constant), those that were read, or why not."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[tuple[str, str], Table | str] = {}

    def add(self, node: Node) -> int:
        """Append a node; its index."""
        self.append(node)
        return len(self) - 1

    def unknown(self, why: str) -> int:
        """A node of which nothing is known."""
        return self.add(Node("unknown", "", note=why))

    def constant(self, value: int, dtype: str = "s64") -> int:
        """A number, wrapped to its type."""
        return self.add(Node("constant", dtype, value=wrap(value, dtype)))

    def apply(self, opcode: str, dtype: str, args: tuple[int, ...], direction: str = "") -> int:
        """An operation on nodes; carried out at once if they are constants, unknown if one of them is."""
        if len(args) != OPERAND_COUNTS.get(opcode, 2):
            return self.unknown(f"{opcode} of {len(args)} operands")
        nodes = [self[arg] for arg in args]
        odd = next((n.note for n in nodes if is_odd(n)), None)
        if odd is not None and opcode != "and":
            return self.unknown(odd)
        if all(node.op == "constant" for node in nodes):
            try:
                node = Node(opcode, dtype, tuple(range(len(nodes))), note=direction)
                return self.constant(operation(node)([node.value for node in nodes]), dtype)
            except (ZeroDivisionError, ValueError, TypeError) as error:
                return self.unknown(f"{opcode}: {error}")
        return self.add(Node(opcode, dtype, args, note=direction))

    def lookup(self, table: Table, dtype: str, at: tuple[int, ...]) -> int:
        """The entry of a table at some index nodes."""
        odd = next((self[index].note for index in at if is_odd(self[index])), None)
        if odd is not None or len(at) != len(table.dims):
            return self.unknown(odd or "a table with another number of indices")
        if all(self[index].op == "constant" for index in at):
            node = Node("lookup", dtype, tuple(range(len(at))), table=table)
            try:
                return self.constant(operation(node)([self[index].value for index in at]), dtype)
            except ValueError as error:
                return self.unknown(str(error))
        return self.add(Node("lookup", dtype, at, table=table))


def is_odd(node: Node) -> bool:
    """Whether a node cannot be computed with; its note says why."""
    return node.op == "unknown" or (node.op == "state" and bool(node.note))


def operation(node: Node) -> Callable[[Mapping[int, int] | list[int]], int]:
    """What computes `node` from the values of its arguments, wrapped to its type.

    Calling it raises ZeroDivisionError, ValueError or TypeError where the arithmetic is not defined.
    """
    dtype, args = node.dtype, node.args
    if node.op == "lookup" and node.table is not None:
        table = node.table
        return lambda values: wrap(_entry(table, [values[arg] for arg in args]), dtype)
    compute = _function(node)
    if len(args) == 2:
        left, right = args
        return lambda values: wrap(compute(values[left], values[right]), dtype)
    return lambda values: wrap(compute(*[values[arg] for arg in args]), dtype)


def _function(node: Node) -> Callable[..., int]:
    if node.op == "compare":
        return COMPARISONS.get(node.note, undefined)
    if node.op in SAME_VALUE:
        return bool if node.dtype == "pred" else int
    return OPERATIONS[node.op]


def _entry(table: Table, at: list[int]) -> int:
    flat = 0
    for index, extent in zip(at, table.dims, strict=True):
        if not 0 <= index < extent:
            raise ValueError("an index outside its table")
        flat = flat * extent + index
    return table.values[flat]


def operand_ref(frame: Frame, operand: Operand, path: Path = (), at: tuple[int, ...] = ()) -> Ref:
    """The element of an operand that is wanted."""
    return Ref(frame, operand.name, (*operand.index, *path), at)


def operand_shape(frame: Frame, instruction: Instruction, position: int) -> Shape:
    """The shape of an operand, of type '' where the text does not say."""
    if position >= len(instruction.operands):
        return Shape("")
    operand = instruction.operands[position]
    source = frame.computation.instructions.get(operand.name)
    return element_shape(source.shape, operand.index) if source else instruction.shape


def element_shape(shape: Shape, path: Path) -> Shape:
    """The shape at `path` of a tuple; of type '' when there is none."""
    for index in path:
        shape = shape.leaves[index] if index < len(shape.leaves) else Shape("")
    return shape


def is_array(shape: Shape) -> bool:
    """Whether a shape has, or may have, another number of elements than one."""
    return any(extent != 1 for extent in shape.dims)


def oddity(shape: Shape) -> str:
    """Why an element of a loop's state cannot be computed with, or nothing."""
    if shape.dtype not in BITS:
        return f"the loop's counter is {shape.dtype}"
    return "the loop's state is an array" if is_array(shape) else ""
