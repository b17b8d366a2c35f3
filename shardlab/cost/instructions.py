"""What each instruction of a step costs: FLOPs, HBM traffic, and how often it runs. Computed when asked for.

A row is an instruction that the device runs as one: a fusion with all that is in it, a kernel, a copy, a
collective. FLOPs of a fusion are those of the products inside it. Sums over a step respect loops; of a
conditional they take the dearest branch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from shardlab.attribute.calls import CallGraph, call_graph, step_totals
from shardlab.attribute.neighbours import enclosing_op_name
from shardlab.attribute.origin import Origin, is_training, origin_of
from shardlab.attribute.schedule import Range
from shardlab.cost.flops import Flops, NotCountedWork, Product, find_products, total_flops
from shardlab.cost.hbm import Traffic, all_fused_traffic, fused_computations, instruction_traffic
from shardlab.cost.kernels import Work
from shardlab.cost.products import NotCountedError
from shardlab.hlo.attributes import computation_names, metadata
from shardlab.hlo.module import Instruction, Module

_SUMS = ("read", "written", "other", "recompute", "host")
_CLONED = re.compile(r"\.remat[0-9]*(?:\.|$)")
_MAX_VISITED = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class InstructionCost:
    """One instruction; FLOPs and bytes are per execution, on one device.

    kind: its opcode, without `-start`, or a custom call's target. recompute: done again for the backward
    pass, by JAX's remat (known by its scope) or by XLA's own (by its `.remat` clones). traffic: None where it
    is not known. phase, layer, op_name, source: as in `attribute.origin.Origin`; of a fusion those of its
    largest product. products: what the FLOPs are the sum of. Flash attention's second look at its scores is
    inside its kernel, and no recompute.
    """

    name: str
    computation: str
    kind: str
    executions: Range
    matmul_flops: int
    attention_flops: int
    recompute: bool
    traffic: Traffic | None
    phase: str
    layer: str
    op_name: str
    source: str
    products: tuple[Work, ...] = ()

    @property
    def flops(self) -> int:
        """matmul + attention."""
        return self.matmul_flops + self.attention_flops

    @property
    def hbm_bytes(self) -> int | None:
        """Bytes read from and written to HBM; None where they are not known."""
        return None if self.traffic is None else self.traffic.read_bytes + self.traffic.written_bytes

    @property
    def intensity(self) -> Fraction | None:
        """Arithmetic intensity, FLOPs per byte of HBM traffic; None where there is none or it is unknown."""
        return Fraction(self.flops, self.hbm_bytes) if self.hbm_bytes else None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """FLOPs and HBM traffic of one device's step. None: in a loop that cannot be bounded.

    recompute_flops: the part of the FLOPs that `recompute` instructions do.
    instructions: those that do products or move bytes, in printed order, callers first. not_counted: those
    whose traffic is not in the sums (work that is not: `flops.unknown`). unpriced: computation and name of
    both. other_bytes: read and written in memory that is not HBM. host_bytes: of those, to and from the host
    (no network traffic).
    """

    flops: Flops
    recompute_flops: int | None
    read_bytes: int | None
    written_bytes: int | None
    other_bytes: int | None
    instructions: tuple[InstructionCost, ...]
    not_counted: tuple[NotCountedWork, ...]
    unpriced: frozenset[tuple[str, str]] = frozenset()
    host_bytes: int | None = 0


def step_cost(module: Module, backend: str) -> StepCost:
    """What a module's step costs, per instruction and in total. backend: says what memory spaces mean.

    Raises ParseError as `call_graph` does, and for metadata that cannot be read.
    """
    graph = call_graph(module)
    products = find_products(module, graph)
    rows = _Rows(module, graph, backend, products.by_computation)
    made = tuple(rows.all())
    totals = step_totals(graph, _amounts(made))
    read, written, other, again, host = (_upper(totals.get(key)) for key in _SUMS)
    return StepCost(
        flops=total_flops(graph, products),
        recompute_flops=again,
        read_bytes=read,
        written_bytes=written,
        other_bytes=other,
        host_bytes=host,
        instructions=made,
        not_counted=tuple(rows.not_counted),
        unpriced=frozenset((*products.unknown_places, *rows.unpriced)),
    )


class _Rows:
    """Makes the rows of one module."""

    def __init__(
        self, module: Module, graph: CallGraph, backend: str, products: Mapping[str, Sequence[Product]]
    ) -> None:
        self.module, self.graph, self.backend = module, graph, backend
        self.inside = fused_computations(graph.sites)
        self.fused = all_fused_traffic(module, graph, self.inside)
        self.products = _with_callees(graph, self.inside, products)
        self.training = is_training(module, graph.sites.order)
        self.users: dict[str, Mapping[str, Sequence[Instruction]]] = {}
        self.not_counted: list[NotCountedWork] = []
        self.unpriced: list[tuple[str, str]] = []

    def all(self) -> Iterator[InstructionCost]:
        """Rows of all computations that run by themselves."""
        for name in self.graph.sites.order:
            times = self.graph.times[name]
            if name not in self.inside and times[1] != 0:
                own: dict[str, list[Product]] = {}
                for product in self.products.get(name, ()):
                    own.setdefault(product.instruction.name, []).append(product)
                for instruction in self.module.computations[name].instructions.values():
                    yield from self._row(name, instruction, times, own.get(instruction.name, ()))

    def _row(
        self, computation: str, instruction: Instruction, times: Range, own: Sequence[Product]
    ) -> Iterator[InstructionCost]:
        traffic = self._traffic(computation, instruction)
        products = [*own, *self._products_inside(instruction)]
        if not products and traffic in (None, Traffic(0, 0)):
            return
        origin = self._origin(computation, instruction, products)
        target = instruction.attributes.get("custom_call_target", "").strip('"')
        flops = {
            kind: sum(p.work.flops for p in products if p.work.kind == kind)
            for kind in ("matmul", "attention")
        }
        yield InstructionCost(
            name=instruction.name,
            computation=computation,
            kind=target or instruction.opcode.removesuffix("-start"),
            executions=times,
            matmul_flops=flops["matmul"],
            attention_flops=flops["attention"],
            recompute=origin.recompute or bool(_CLONED.search(instruction.name)),
            traffic=traffic,
            phase=origin.phase,
            layer=origin.layer,
            op_name=origin.op_name,
            source=origin.source,
            products=tuple(product.work for product in products),
        )

    def _traffic(self, computation: str, instruction: Instruction) -> Traffic | None:
        try:
            where = self.module.computations[computation]
            return instruction_traffic(instruction, where, self.fused, self.backend)
        except NotCountedError as reason:
            what = instruction.attributes.get("custom_call_target", instruction.opcode).strip('"')
            self.not_counted.append(NotCountedWork(instruction.name, what, str(reason)))
            self.unpriced.append((computation, instruction.name))
            return None

    def _products_inside(self, instruction: Instruction) -> Iterator[Product]:
        """Products of the fusion or kernel that an instruction runs."""
        if not instruction.opcode.endswith(("-update", "-done")):
            for attribute in ("calls", "called_computations"):
                for callee in computation_names(instruction, attribute):
                    yield from self.products.get(callee, ()) if callee in self.inside else ()

    def _origin(self, computation: str, instruction: Instruction, products: Sequence[Product]) -> Origin:
        largest = sorted(products, key=lambda product: -product.work.flops)[:1]
        named = [*(product.instruction for product in largest), instruction]
        return origin_of(
            self.module, named, self.training, lambda: self._op_name_nearby(computation, instruction)
        )

    def _op_name_nearby(self, computation: str, instruction: Instruction) -> str:
        """The op_name of the nearest user, else of the loop around: compilers drop that of what they rewrite.

        Users tell recomputation from the backward pass, which uses its results and is never used by it.
        """
        users, reached = self._users_in(computation), {instruction.name: instruction}
        queue = [instruction]
        for visited in queue:
            for user in users.get(visited.name, ()):
                name = metadata(user).op_name
                if "/" in name:
                    return name
                if user.name not in reached and len(reached) < _MAX_VISITED:
                    reached[user.name] = user
                    queue.append(user)
        return enclosing_op_name(self.graph.sites, computation)

    def _users_in(self, computation: str) -> Mapping[str, Sequence[Instruction]]:
        if computation not in self.users:
            users: dict[str, list[Instruction]] = {}
            for instruction in self.module.computations[computation].instructions.values():
                for operand in instruction.operands:
                    users.setdefault(operand.name, []).append(instruction)
            self.users[computation] = users
        return self.users[computation]


def _with_callees(
    graph: CallGraph, inside: frozenset[str], products: Mapping[str, Sequence[Product]]
) -> dict[str, tuple[Product, ...]]:
    """Products by computation; those of a fused computation with what it calls, as often as it calls it."""
    found: dict[str, tuple[Product, ...]] = {name: tuple(own) for name, own in products.items()}
    for name in reversed(graph.sites.order):  # callees first
        if name in inside:
            for site in graph.sites.by_caller[name]:
                more = found.get(site.callee, ())
                if more:
                    found[name] = (*found.get(name, ()), *more)
    return found


def _amounts(rows: Sequence[InstructionCost]) -> dict[str, dict[str, Fraction]]:
    amounts: dict[str, dict[str, Fraction]] = {}
    for row in rows:
        sums = amounts.setdefault(row.computation, dict.fromkeys(_SUMS, Fraction(0)))
        sums["recompute"] += row.flops if row.recompute else 0
        if row.traffic is not None:
            sums["read"] += row.traffic.read_bytes
            sums["written"] += row.traffic.written_bytes
            sums["other"] += row.traffic.other_bytes
            sums["host"] += row.traffic.host_bytes
    return amounts


def _upper(total: tuple[Fraction, Fraction | None] | None) -> int | None:
    high = total[1] if total is not None else Fraction(0)
    return None if high is None else int(high)
