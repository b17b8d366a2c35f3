"""The executor of pipeline schedules: one loop over ticks, one branch per kind of work item.

Every schedule runs here; what differs is the table (spec/tick_table.py). Forward and backward are both
written out, so a stage keeps what the table says and nothing else: differentiating the loop would keep every
tick's activations, which is GPipe's memory whatever the schedule.

Stages with fewer layers are branches of their own with a loop of their own length: a masked slot would cost
a layer's time, and a loop whose length depends on the device cannot be counted in the compiled program.

Each stage takes its own branch. So collectives in branches stay within a stage (tensor parallelism, FSDP),
and what passes between stages does so after the branches, at every tick.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from shardlab.model.transformer import Params
from shardlab.parallel.stage import LAYERS, Factors, StageModel, Stream
from shardlab.spec.tick_table import Branch, Column, Edges, TickTable, Transfer

Place = Callable[[str, jax.Array], jax.Array]
Buffer = TypeVar("Buffer")  # an array, or a tuple of arrays with the same leading dimensions


class Inbox(NamedTuple):
    """What a stage keeps until its backward: written between ticks, only read by the branches.

    A buffer that branches write as well would be copied whole in each of them. stash: the inputs of a
    chunk's layers [slots, layers, …]. cotangents: of a chunk's output [slots, …].
    """

    stash: Stream
    cotangents: Stream


class Sums(NamedTuple):
    """What branches add to. gradients: f32, by path. loss: f32 scalar.

    pairs: factors of kernels' gradients [slots, layers, …], empty unless backwards are split.
    """

    gradients: Params
    loss: jax.Array
    pairs: Factors


class Made(NamedTuple):
    """What a tick makes beside sums. out: an activation or a cotangent; inputs [layers, …]: of the layers
    that went forward."""

    out: Stream
    inputs: Stream


class Arrived(NamedTuple):
    """What the neighbours sent at the end of the last tick; the table says what is to be kept."""

    stream: Stream
    cotangent: Stream


Carry = tuple[Inbox, Sums, Arrived]


class Cell(NamedTuple):
    """What the table says for one tick and stage: scalars (see TickTable)."""

    branch: jax.Array
    microbatch: jax.Array
    chunk: jax.Array
    stash: jax.Array
    cotangent: jax.Array
    pair: jax.Array
    receive_stash: jax.Array
    receive_cotangent: jax.Array
    keep_stash: jax.Array
    keep_cotangent: jax.Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Executor:
    """One stage's program. layers: the stage's stacked layer parameters [slots, …] by path; outer: the rest.

    tokens, targets: [microbatches, B, L]. chunk_slots: layer slots of a chunk. axis: the mesh axis of the
    stages. place: pins a part of the stream ("x") or a gradient (by path) to where the plan wants it.
    """

    stage: StageModel
    table: TickTable
    axis: str
    chunk_slots: int
    layers: Params
    outer: Params
    tokens: jax.Array
    targets: jax.Array
    place: Place

    def run(self) -> tuple[jax.Array, Params]:
        """The loss and the gradients of this stage, means over the microbatches."""
        stage = jax.lax.axis_index(self.axis)

        def tick(carry: Carry, tick: jax.Array) -> tuple[Carry, None]:
            inbox, sums, arrived = carry
            cell = Cell(*(_lookup(getattr(self.table, name), tick, stage) for name in Cell._fields))
            inbox = _received(inbox, arrived, cell)
            branches = [self._branch(branch, cell, inbox) for branch in self.table.branches]
            sums, made = jax.lax.switch(cell.branch, branches, sums)
            return (_kept(inbox, made, cell), sums, self._exchange(made.out, tick)), None

        ticks = jnp.arange(len(self.table.branch), dtype=jnp.int32)
        (_, sums, _), _ = jax.lax.scan(tick, self._start(), ticks)
        return sums.loss, sums.gradients

    def _branch(self, branch: Branch, cell: Cell, inbox: Inbox) -> Callable[[Sums], tuple[Sums, Made]]:
        backward = self._input_gradient if self.table.pair_slots else self._backward
        work = {"idle": self._idle, "F": self._forward, "B": backward, "W": self._weights}
        return lambda sums: work[branch.kind](branch, cell, inbox, sums)

    def _idle(self, _: Branch, cell: Cell, inbox: Inbox, sums: Sums) -> tuple[Sums, Made]:
        return sums, _made(inbox)

    def _forward(self, branch: Branch, cell: Cell, inbox: Inbox, sums: Sums) -> tuple[Sums, Made]:
        """The layers of a chunk; the last chunk goes on to the loss, and makes its gradient."""
        if branch.first:
            x = jax.vjp(self.stage.embed, self.outer, self.tokens[cell.microbatch])[0]
        else:
            x = _read(inbox.stash, cell.stash, jnp.int32(0))

        def layer(x: Stream, i: jax.Array) -> tuple[Stream, Stream]:
            return self.stage.forward(self._layer(cell, i), x), x

        with jax.named_scope("layers"):
            x, inputs = jax.lax.scan(layer, x, _count(branch))
        unused = self.chunk_slots - branch.layers
        inputs = jax.tree.map(lambda a: jnp.pad(a, ((0, unused), *((0, 0),) * (a.ndim - 1))), inputs)
        if branch.last:
            sums, x = self._loss(cell, sums, x)
        return sums, Made(x, inputs)

    def _loss(self, cell: Cell, sums: Sums, x: Stream) -> tuple[Sums, Stream]:
        """Head and loss of one microbatch, and the gradient of x."""
        targets = self.targets[cell.microbatch]
        share = 1.0 / self.targets.shape[0]
        loss, pull = jax.vjp(lambda outer, x: self.stage.loss(outer, x, targets), self.outer, x)
        found, cotangent = pull(jnp.asarray(share, loss.dtype))
        gradients = self._added(sums.gradients, found)
        return sums._replace(gradients=gradients, loss=sums.loss + loss * share), cotangent

    def _backward(self, branch: Branch, cell: Cell, inbox: Inbox, sums: Sums) -> tuple[Sums, Made]:
        """The layers of a chunk from the last to the first, each from its stashed input."""

        def layer(carry: tuple[Params, Stream], i: jax.Array) -> tuple[tuple[Params, Stream], None]:
            gradients, cotangent = carry
            x = _read(inbox.stash, cell.stash, i)
            found, cotangent = self.stage.backward(self._layer(cell, i), x, cotangent)
            return (self._added(gradients, found, cell, i), cotangent), None

        start = (sums.gradients, _read(inbox.cotangents, cell.cotangent))
        with jax.named_scope("layers"):
            (gradients, cotangent), _ = jax.lax.scan(layer, start, _count(branch), reverse=True)
        return self._embedding(branch, cell, inbox, sums._replace(gradients=gradients), cotangent)

    def _input_gradient(self, branch: Branch, cell: Cell, inbox: Inbox, sums: Sums) -> tuple[Sums, Made]:
        """As `_backward`, but the kernels' gradients stay undone: their factors are kept."""
        Loop = tuple[Params, Factors, Stream]

        def layer(carry: Loop, i: jax.Array) -> tuple[Loop, None]:
            gradients, pairs, cotangent = carry
            x = _read(inbox.stash, cell.stash, i)
            found, cotangent, factors = self.stage.input_gradient(self._layer(cell, i), x, cotangent)
            pairs = _write(pairs, factors, cell.pair, i)
            return (self._added(gradients, found, cell, i), pairs, cotangent), None

        start = (sums.gradients, sums.pairs, _read(inbox.cotangents, cell.cotangent))
        with jax.named_scope("layers"):
            (gradients, pairs, cotangent), _ = jax.lax.scan(layer, start, _count(branch), reverse=True)
        sums = sums._replace(gradients=gradients, pairs=pairs)
        return self._embedding(branch, cell, inbox, sums, cotangent)

    def _weights(self, branch: Branch, cell: Cell, inbox: Inbox, sums: Sums) -> tuple[Sums, Made]:
        """The kernels' gradients of a chunk."""

        def layer(gradients: Params, i: jax.Array) -> tuple[Params, None]:
            factors = _read(sums.pairs, cell.pair, i)
            found = self.stage.kernel_gradients(self._layer(cell, i), _first(inbox.cotangents), factors)
            return self._added(gradients, found, cell, i), None

        with jax.named_scope("layers"):
            gradients, _ = jax.lax.scan(layer, sums.gradients, _count(branch))
        return sums._replace(gradients=gradients), _made(inbox)

    def _embedding(
        self, branch: Branch, cell: Cell, inbox: Inbox, sums: Sums, cotangent: Stream
    ) -> tuple[Sums, Made]:
        """The first chunk ends its backward in the embedding."""
        if branch.first:
            tokens = self.tokens[cell.microbatch]
            (found,) = jax.vjp(lambda outer: self.stage.embed(outer, tokens), self.outer)[1](cotangent)
            sums = sums._replace(gradients=self._added(sums.gradients, found))
        return sums, _made(inbox, cotangent)

    def _exchange(self, out: Stream, tick: jax.Array) -> Arrived:
        """Pass what this tick made to the neighbours."""
        moves = [lambda x, t=t: _moved(x, self.axis, t) for t in self.table.transfers]
        with jax.named_scope("pipeline"):
            if len(moves) == 1:
                return moves[0](out)
            return jax.lax.switch(jnp.asarray(self.table.transfer, jnp.int32)[tick], moves, out)

    def _layer(self, cell: Cell, i: jax.Array) -> Params:
        """The parameters of layer i of the item's chunk, by path relative to the layer."""
        slot = cell.chunk * self.chunk_slots + i
        return {path.removeprefix(LAYERS): _read(array, slot) for path, array in self.layers.items()}

    def _added(
        self, gradients: Params, found: Params, cell: Cell | None = None, i: jax.Array | None = None
    ) -> Params:
        """The sums with these gradients: of layer i of the item's chunk, or of parameters of no layer."""
        if cell is None or i is None:
            sums = {path: gradients[path] + array for path, array in found.items()}
        else:
            slot = cell.chunk * self.chunk_slots + i
            sums = {
                LAYERS + path: _write(
                    gradients[LAYERS + path], _read(gradients[LAYERS + path], slot) + array, slot
                )
                for path, array in found.items()
            }
        return {**gradients, **sums}

    def _start(self) -> Carry:
        """All buffers, zero, where they live."""
        x = jax.eval_shape(self.stage.embed, self.outer, self.tokens[0])
        layer = {path.removeprefix(LAYERS): array[0] for path, array in self.layers.items()}
        pairs = Factors((), ())
        if self.table.pair_slots:
            pairs = jax.eval_shape(self.stage.input_gradient, layer, x, x)[2]
        slots, stack = self.table, (self.table.pair_slots, self.chunk_slots)
        inbox = Inbox(
            self._zeros(x, slots.stash_slots, self.chunk_slots), self._zeros(x, slots.cotangent_slots)
        )
        gradients = {
            path: self.place(path, jnp.zeros_like(a)) for path, a in {**self.layers, **self.outer}.items()
        }
        pairs = jax.tree.map(lambda leaf: jnp.zeros((*stack, *leaf.shape), leaf.dtype), pairs)
        nothing = self._zeros(x)
        return inbox, Sums(gradients, jnp.zeros((), jnp.float32), pairs), Arrived(nothing, nothing)

    def _zeros(self, like: Stream, *leading: int) -> Stream:
        """A buffer of streams, where it lives."""

        def zeros(name: str, leaf: jax.ShapeDtypeStruct | None) -> jax.Array | None:
            return None if leaf is None else self.place(name, jnp.zeros((*leading, *leaf.shape), leaf.dtype))

        return Stream(*(zeros(name, leaf) for name, leaf in zip(Stream._fields, like, strict=True)))


def _made(inbox: Inbox, out: Stream | None = None) -> Made:
    """What a tick makes that goes through no layer forward."""
    nothing, inputs = (
        jax.tree.map(jnp.zeros_like, _first(buffer)) for buffer in (inbox.cotangents, inbox.stash)
    )
    return Made(nothing if out is None else out, inputs)


def _first(buffer: Buffer) -> Buffer:
    return jax.tree.map(lambda a: a[0], buffer)


def _received(inbox: Inbox, arrived: Arrived, cell: Cell) -> Inbox:
    """The inbox with what has arrived, where the table says."""
    return Inbox(
        stash=_keep(inbox.stash, arrived.stream, cell.receive_stash, jnp.int32(0)),
        cotangents=_keep(inbox.cotangents, arrived.cotangent, cell.receive_cotangent),
    )


def _kept(inbox: Inbox, made: Made, cell: Cell) -> Inbox:
    """The inbox with the inputs of the layers that went forward, and with the gradient of the loss."""
    return Inbox(
        stash=_keep(inbox.stash, made.inputs, cell.keep_stash),
        cotangents=_keep(inbox.cotangents, made.out, cell.keep_cotangent),
    )


def _count(branch: Branch) -> jax.Array:
    return jnp.arange(branch.layers, dtype=jnp.int32)


def _lookup(column: Column, tick: jax.Array, stage: jax.Array) -> jax.Array:
    return jnp.asarray(column, jnp.int32)[tick, stage]


def _read(buffer: Buffer, *index: jax.Array) -> Buffer:
    """buffer[index], one entry of the leading dimensions."""

    def read(array: jax.Array) -> jax.Array:
        sizes = (1,) * len(index) + array.shape[len(index) :]
        start = (*index, *(jnp.int32(0),) * (array.ndim - len(index)))
        return jax.lax.dynamic_slice(array, start, sizes).reshape(array.shape[len(index) :])

    return jax.tree.map(read, buffer)


def _write(buffer: Buffer, value: Buffer, *index: jax.Array) -> Buffer:
    """The buffer with one entry of the leading dimensions replaced."""

    def write(array: jax.Array, entry: jax.Array) -> jax.Array:
        start = (*index, *(jnp.int32(0),) * entry.ndim)
        entry = entry.astype(array.dtype).reshape((1,) * len(index) + entry.shape)
        return jax.lax.dynamic_update_slice(array, entry, start)

    return jax.tree.map(write, buffer, value)


def _keep(buffer: Buffer, value: Buffer, slot: jax.Array, *index: jax.Array) -> Buffer:
    """`_write`, unless the slot is -1: then nothing has arrived."""
    at = (jnp.maximum(slot, 0), *index)
    kept = jax.tree.map(lambda new, old: jnp.where(slot >= 0, new, old), value, _read(buffer, *at))
    return _write(buffer, kept, *at)


def _moved(out: Stream, axis: str, transfer: Transfer) -> Arrived:
    """In one permute where nobody sends or gets twice: what arrives is then one thing or the other."""
    if transfer.is_permutation:
        arrived = _permute(out, axis, transfer.forward + transfer.backward)
        return Arrived(arrived, arrived)
    return Arrived(_permute(out, axis, transfer.forward), _permute(out, axis, transfer.backward))


def _permute(out: Stream, axis: str, edges: Edges) -> Stream:
    return jax.tree.map(lambda a: jax.lax.ppermute(a, axis, edges) if edges else jnp.zeros_like(a), out)
