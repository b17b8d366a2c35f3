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
from typing import NamedTuple

import jax
import jax.numpy as jnp

from shardlab.model.transformer import Params
from shardlab.parallel.stage import LAYERS, Factors, StageModel
from shardlab.spec.tick_table import Branch, Column, Edges, TickTable, Transfer

Place = Callable[[str, jax.Array], jax.Array]


class Inbox(NamedTuple):
    """What a stage keeps until its backward: written between ticks, only read by the branches.

    A buffer that branches write as well would be copied whole in each of them. stash: the inputs of a
    chunk's layers [slots, layers, B, L, E]. cotangents: of a chunk's output [slots, B, L, E].
    """

    stash: jax.Array
    cotangents: jax.Array


class Sums(NamedTuple):
    """What branches add to. gradients: f32, by path. loss: f32 scalar.

    pairs: factors of kernels' gradients [slots, layers, …], empty unless backwards are split.
    """

    gradients: Params
    loss: jax.Array
    pairs: Factors


class Made(NamedTuple):
    """What a tick makes beside sums. out [B, L, E]: an activation or a cotangent; inputs [layers, B, L, E]:
    of the layers that went forward."""

    out: jax.Array
    inputs: jax.Array


class Arrived(NamedTuple):
    """What the neighbours sent at the end of the last tick [B, L, E]; the table says what is to be kept."""

    x: jax.Array
    cotangent: jax.Array


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
    stages. place: pins the stream "stash" or a gradient (by path) to where the plan wants it.
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

        def layer(x: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
            return self.stage.forward(self._layer(cell, i), x), x

        with jax.named_scope("layers"):
            x, inputs = jax.lax.scan(layer, x, _count(branch))
        unused = self.chunk_slots - branch.layers
        inputs = jnp.pad(inputs, ((0, unused), *((0, 0),) * x.ndim))
        if branch.last:
            sums, x = self._loss(cell, sums, x)
        return sums, Made(x, inputs)

    def _loss(self, cell: Cell, sums: Sums, x: jax.Array) -> tuple[Sums, jax.Array]:
        """Head and loss of one microbatch, and the gradient of x."""
        targets = self.targets[cell.microbatch]
        share = 1.0 / self.targets.shape[0]
        loss, pull = jax.vjp(lambda outer, x: self.stage.loss(outer, x, targets), self.outer, x)
        found, cotangent = pull(jnp.asarray(share, loss.dtype))
        gradients = self._added(sums.gradients, found)
        return sums._replace(gradients=gradients, loss=sums.loss + loss * share), cotangent

    def _backward(self, branch: Branch, cell: Cell, inbox: Inbox, sums: Sums) -> tuple[Sums, Made]:
        """The layers of a chunk from the last to the first, each from its stashed input."""

        def layer(carry: tuple[Params, jax.Array], i: jax.Array) -> tuple[tuple[Params, jax.Array], None]:
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
        Loop = tuple[Params, Factors, jax.Array]

        def layer(carry: Loop, i: jax.Array) -> tuple[Loop, None]:
            gradients, pairs, cotangent = carry
            x = _read(inbox.stash, cell.stash, i)
            found, cotangent, factors = self.stage.input_gradient(self._layer(cell, i), x, cotangent)
            pairs = jax.tree.map(lambda kept, new: _write(kept, new, cell.pair, i), pairs, factors)
            return (self._added(gradients, found, cell, i), pairs, cotangent), None

        start = (sums.gradients, sums.pairs, _read(inbox.cotangents, cell.cotangent))
        with jax.named_scope("layers"):
            (gradients, pairs, cotangent), _ = jax.lax.scan(layer, start, _count(branch), reverse=True)
        sums = sums._replace(gradients=gradients, pairs=pairs)
        return self._embedding(branch, cell, inbox, sums, cotangent)

    def _weights(self, branch: Branch, cell: Cell, inbox: Inbox, sums: Sums) -> tuple[Sums, Made]:
        """The kernels' gradients of a chunk."""

        def layer(gradients: Params, i: jax.Array) -> tuple[Params, None]:
            factors = jax.tree.map(lambda kept: _read(kept, cell.pair, i), sums.pairs)
            found = self.stage.kernel_gradients(self._layer(cell, i), inbox.cotangents[0], factors)
            return self._added(gradients, found, cell, i), None

        with jax.named_scope("layers"):
            gradients, _ = jax.lax.scan(layer, sums.gradients, _count(branch))
        return sums._replace(gradients=gradients), _made(inbox)

    def _embedding(
        self, branch: Branch, cell: Cell, inbox: Inbox, sums: Sums, cotangent: jax.Array
    ) -> tuple[Sums, Made]:
        """The first chunk ends its backward in the embedding."""
        if branch.first:
            tokens = self.tokens[cell.microbatch]
            (found,) = jax.vjp(lambda outer: self.stage.embed(outer, tokens), self.outer)[1](cotangent)
            sums = sums._replace(gradients=self._added(sums.gradients, found))
        return sums, _made(inbox, cotangent)

    def _exchange(self, out: jax.Array, tick: jax.Array) -> Arrived:
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
            self.place("stash", jnp.zeros((slots.stash_slots, self.chunk_slots, *x.shape), x.dtype)),
            self.place("cotangents", jnp.zeros((slots.cotangent_slots, *x.shape), x.dtype)),
        )
        gradients = {
            path: self.place(path, jnp.zeros_like(a)) for path, a in {**self.layers, **self.outer}.items()
        }
        pairs = jax.tree.map(lambda leaf: jnp.zeros((*stack, *leaf.shape), leaf.dtype), pairs)
        nothing = self.place("arrived", jnp.zeros(x.shape, x.dtype))
        return inbox, Sums(gradients, jnp.zeros((), jnp.float32), pairs), Arrived(nothing, nothing)


def _made(inbox: Inbox, out: jax.Array | None = None) -> Made:
    """What a tick makes that goes through no layer forward."""
    return Made(jnp.zeros_like(inbox.cotangents[0]) if out is None else out, jnp.zeros_like(inbox.stash[0]))


def _received(inbox: Inbox, arrived: Arrived, cell: Cell) -> Inbox:
    """The inbox with what has arrived, where the table says."""
    return Inbox(
        stash=_keep(inbox.stash, arrived.x, cell.receive_stash, jnp.int32(0)),
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


def _read(buffer: jax.Array, *index: jax.Array) -> jax.Array:
    """buffer[index], one entry of the leading dimensions."""
    sizes = (1,) * len(index) + buffer.shape[len(index) :]
    start = (*index, *(jnp.int32(0),) * (buffer.ndim - len(index)))
    return jax.lax.dynamic_slice(buffer, start, sizes).reshape(buffer.shape[len(index) :])


def _write(buffer: jax.Array, value: jax.Array, *index: jax.Array) -> jax.Array:
    """The buffer with one entry of the leading dimensions replaced."""
    start = (*index, *(jnp.int32(0),) * value.ndim)
    return jax.lax.dynamic_update_slice(
        buffer, value.astype(buffer.dtype).reshape((1,) * len(index) + value.shape), start
    )


def _keep(buffer: jax.Array, value: jax.Array, slot: jax.Array, *index: jax.Array) -> jax.Array:
    """`_write`, unless the slot is -1: then nothing has arrived."""
    at = (jnp.maximum(slot, 0), *index)
    return _write(buffer, jnp.where(slot >= 0, value, _read(buffer, *at)), *at)


def _moved(x: jax.Array, axis: str, transfer: Transfer) -> Arrived:
    """In one permute where nobody sends or gets twice: what arrives is then one thing or the other."""
    if transfer.is_permutation:
        arrived = _permute(x, axis, transfer.forward + transfer.backward)
        return Arrived(arrived, arrived)
    return Arrived(_permute(x, axis, transfer.forward), _permute(x, axis, transfer.backward))


def _permute(x: jax.Array, axis: str, edges: Edges) -> jax.Array:
    return jax.lax.ppermute(x, axis, edges) if edges else jnp.zeros_like(x)
