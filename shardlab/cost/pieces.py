"""Collectives in pieces beside the products that use them: PyTorch's async tensor parallelism.

An all-gather and the products that multiply what it gathers, or a product and the reduce-scatter of its
result, are cut into as many pieces as there are devices: while one is multiplied, another is on its way
(pytorch/pytorch torch/distributed/_symmetric_memory, `_pipelined_multi_all_gather_and_consume` and
`_pipelined_produce_and_all2all`). One piece is waited for; of the others as much is hidden as the products
take, each as long as a product of its own shape. Which are cut: torch/_inductor/fx_passes/
micro_pipeline_tp.py. Not the sum of several products before it is reduced, nor what is summed over all
gathered tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from shardlab.cost.kernels import Work
from shardlab.cost.products import MatmulShape
from shardlab.cost.walk import Kernel, Place, Transfer
from shardlab.hlo.lookup import operand_names, shape_of
from shardlab.hlo.module import Computation, Module, Shape

_PASSES_ON = ("bitcast", "get-tuple-element", "copy", "reshape")
ProductS = Callable[[MatmulShape], float]


@dataclass(frozen=True, slots=True)
class Pieces:
    """What changes: the products' kernels, and what of the transfers is not hidden."""

    kernels: Mapping[Place, Kernel]
    transfers: Mapping[Place, tuple[Transfer, ...]]


def in_pieces(
    module: Module,
    products: Mapping[Place, Sequence[Work]],
    kernels: Mapping[Place, Kernel],
    transfers: Mapping[Place, tuple[Transfer, ...]],
    ways: Mapping[Place, int],
    product_s: ProductS,
) -> Pieces:
    """The step's kernels and transfers where those of `ways`, one by one, are cut into so many pieces.

    products: of each kernel that has some.
    """
    slower, shorter = dict(kernels), dict(transfers)
    wires: dict[str, _Wires] = {}
    for place, count in ways.items():
        computation, (transfer,) = place[0], transfers[place]
        if computation not in wires:
            known = {name for within, name in products if within == computation}
            wires[computation] = _wires(module.computations[computation], known)
        wire = wires[computation]
        beside_s = 0.0
        beside = wire.users if transfer.kind == "all-gather" else wire.makers
        for name in beside(place[1]):
            works = products.get((computation, name), ())
            if not works or (transfer.kind == "all-gather" and not _by_token(works, wire.shape(place[1]))):
                continue
            pieces_s = sum(count * _piece_s(work.shape, count, product_s) for work in works)
            beside_s += pieces_s
            kernel = slower[computation, name]
            if kernel.time_s is not None:
                slower[computation, name] = replace(kernel, time_s=max(kernel.time_s, pieces_s))
        if transfer.time_s:
            left = 1 - min(1.0, beside_s / transfer.time_s) * (count - 1) / count
            busy = {tier: busy_s * left for tier, busy_s in transfer.tier_s.items()}
            shorter[place] = (replace(transfer, time_s=transfer.time_s * left, tier_s=busy),)
    return Pieces(slower, shorter)


def _piece_s(shape: object, count: int, product_s: ProductS) -> float:
    """Seconds of the product of one piece of the tokens, of which there are more than of features."""
    if not isinstance(shape, MatmulShape):
        return 0.0
    if shape.m > shape.n:
        return product_s(replace(shape, m=-(-shape.m // count)))
    return product_s(replace(shape, n=-(-shape.n // count)))


def _by_token(works: Sequence[Work], gathered: Shape | None) -> bool:
    """Whether features are what these products sum over; tokens come before them in what was gathered."""
    features = gathered.dims[-1] if gathered is not None and gathered.dims else None
    return all(isinstance(work.shape, MatmulShape) and work.shape.k == features for work in works)


@dataclass(frozen=True, slots=True)
class _Wires:
    """Who uses what in a computation, by name; products: of its kernels."""

    computation: Computation
    products: Container[str]
    operands: Mapping[str, Sequence[str]]
    used_by: Mapping[str, Sequence[str]]

    def shape(self, name: str) -> Shape | None:
        """Of an array; of a start the result, which comes last."""
        shape = shape_of(self.computation.instructions, name)
        while shape is not None and shape.leaves:
            arrays = [leaf for leaf in shape.leaves if leaf.leaves or len(leaf.dims) > 0]
            shape = arrays[-1] if arrays else None
        return shape

    def users(self, name: str) -> Iterator[str]:
        """The kernels that take a collective's result."""
        for user in self.used_by.get(name, ()):
            opcode = self.computation.instructions[user].opcode
            if opcode in _PASSES_ON or opcode.endswith("-done"):
                yield from self.users(user)
            else:
                yield user

    def makers(self, name: str) -> Iterator[str]:
        """The product whose result a collective takes, through what only scales or converts it; none where
        it adds up several results."""
        for maker in self._arrays(name)[:1]:
            arrays = self._arrays(maker)
            if maker in self.products:
                yield from [maker] if len(arrays) == 2 else []
            elif self.computation.instructions[maker].opcode in (*_PASSES_ON, "fusion"):
                half = self._size(maker) / 2  # scales of rows and columns are smaller
                if sum(self._size(array) >= half for array in arrays) == 1:
                    yield from self.makers(maker)

    def _size(self, name: str) -> int:
        shape = self.shape(name)
        return prod(size or 0 for size in shape.dims) if shape is not None else 0

    def _arrays(self, name: str) -> list[str]:
        """The operands that are more than one number, largest first."""
        names = [name for name in self.operands.get(name, ()) if self._size(name) > 1]
        return sorted(names, key=self._size, reverse=True)


def _wires(computation: Computation, products: Container[str]) -> _Wires:
    operands = operand_names(computation.instructions)
    used_by: dict[str, list[str]] = {}
    for name, names in operands.items():
        for operand in dict.fromkeys(names):
            used_by.setdefault(operand, []).append(name)
    return _Wires(computation, products, operands, used_by)
