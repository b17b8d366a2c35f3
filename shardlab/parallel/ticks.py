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
from shardlab.spec.tick_table import Branch, Column, Edges, TickTable

Place = Callable[[str, jax.Array], jax.Array]


class Buffers(NamedTuple):
    """What a stage holds between ticks.

    stash: the inputs of a chunk's layers [slots, layers, B, L, E]. cotangents: of a chunk's output [slots, B,
    L, E]. pairs: factors of kernels' gradients [slots, layers, …], empty unless backwards are split.
    gradients: sums so far, f32, by path. loss: sum so far.
    """

    stash: jax.Array
    cotangents: jax.Array
    pairs: Factors
    gradients: Params
    loss: jax.Array


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

        def tick(buffers: Buffers, tick: jax.Array) -> tuple[Buffers, None]:
            cell = Cell(*(_lookup(getattr(self.table, name), tick, stage) for name in Cell._fields))
            branches = [self._branch(branch, cell) for branch in self.table.branches]
            buffers, out = jax.lax.switch(cell.branch, branches, buffers)
            return self._exchange(buffers, out, cell, tick), None

        ticks = jnp.arange(len(self.table.branch), dtype=jnp.int32)
        buffers, _ = jax.lax.scan(tick, self._empty(), ticks)
        return buffers.loss, buffers.gradients

    def _branch(self, branch: Branch, cell: Cell) -> Callable[[Buffers], tuple[Buffers, jax.Array]]:
        work = {"idle": self._idle, "F": self._forward, "B": self._backward, "W": self._weights}
        if branch.kind == "B" and self.table.pair_slots:
            return lambda buffers: self._input_gradient(branch, cell, buffers)
        return lambda buffers: work[branch.kind](branch, cell, buffers)

    def _idle(self, _: Branch, cell: Cell, buffers: Buffers) -> tuple[Buffers, jax.Array]:
        return buffers, jnp.zeros_like(buffers.cotangents[0])

    def _forward(self, branch: Branch, cell: Cell, buffers: Buffers) -> tuple[Buffers, jax.Array]:
        """The layers of a chunk; the last chunk goes on to the loss and leaves its gradient for B."""
        if branch.first:
            x = jax.vjp(self.stage.embed, self.outer, self.tokens[cell.microbatch])[0]
        else:
            x = _read(buffers.stash, cell.stash, jnp.int32(0))

        def layer(carry: tuple[jax.Array, jax.Array], i: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
            stash, x = carry
            stash = _write(stash, x, cell.stash, i)
            return (stash, self.stage.forward(self._layer(cell, i), x)), None

        with jax.named_scope("layers"):
            (stash, x), _ = jax.lax.scan(layer, (buffers.stash, x), _count(branch))
        buffers = buffers._replace(stash=stash)
        return (self._loss(cell, buffers, x), x) if branch.last else (buffers, x)

    def _loss(self, cell: Cell, buffers: Buffers, x: jax.Array) -> Buffers:
        """Head and loss of one microbatch, forward and backward."""
        targets = self.targets[cell.microbatch]
        share = 1.0 / self.targets.shape[0]
        loss, pull = jax.vjp(lambda outer, x: self.stage.loss(outer, x, targets), self.outer, x)
        gradients, cotangent = pull(jnp.asarray(share, loss.dtype))
        return buffers._replace(
            cotangents=_write(buffers.cotangents, cotangent, cell.cotangent),
            gradients=self._added(buffers.gradients, gradients),
            loss=buffers.loss + loss * share,
        )

    def _backward(self, branch: Branch, cell: Cell, buffers: Buffers) -> tuple[Buffers, jax.Array]:
        """The layers of a chunk from the last to the first, each from its stashed input."""

        def layer(carry: tuple[Params, jax.Array], i: jax.Array) -> tuple[tuple[Params, jax.Array], None]:
            gradients, cotangent = carry
            x = _read(buffers.stash, cell.stash, i)
            found, cotangent = self.stage.backward(self._layer(cell, i), x, cotangent)
            return (self._added(gradients, found, cell, i), cotangent), None

        start = (buffers.gradients, _read(buffers.cotangents, cell.cotangent))
        with jax.named_scope("layers"):
            (gradients, cotangent), _ = jax.lax.scan(layer, start, _count(branch), reverse=True)
        return self._embedding(branch, cell, buffers._replace(gradients=gradients), cotangent)

    def _input_gradient(self, branch: Branch, cell: Cell, buffers: Buffers) -> tuple[Buffers, jax.Array]:
        """As `_backward`, but the kernels' gradients stay undone: their factors are kept."""
        Carry = tuple[Params, Factors, jax.Array]

        def layer(carry: Carry, i: jax.Array) -> tuple[Carry, None]:
            gradients, pairs, cotangent = carry
            x = _read(buffers.stash, cell.stash, i)
            found, cotangent, factors = self.stage.input_gradient(self._layer(cell, i), x, cotangent)
            pairs = jax.tree.map(lambda kept, new: _write(kept, new, cell.pair, i), pairs, factors)
            return (self._added(gradients, found, cell, i), pairs, cotangent), None

        start = (buffers.gradients, buffers.pairs, _read(buffers.cotangents, cell.cotangent))
        with jax.named_scope("layers"):
            (gradients, pairs, cotangent), _ = jax.lax.scan(layer, start, _count(branch), reverse=True)
        return self._embedding(branch, cell, buffers._replace(gradients=gradients, pairs=pairs), cotangent)

    def _weights(self, branch: Branch, cell: Cell, buffers: Buffers) -> tuple[Buffers, jax.Array]:
        """The kernels' gradients of a chunk."""

        def layer(gradients: Params, i: jax.Array) -> tuple[Params, None]:
            factors = jax.tree.map(lambda kept: _read(kept, cell.pair, i), buffers.pairs)
            found = self.stage.kernel_gradients(self._layer(cell, i), buffers.cotangents[0], factors)
            return self._added(gradients, found, cell, i), None

        with jax.named_scope("layers"):
            gradients, _ = jax.lax.scan(layer, buffers.gradients, _count(branch))
        return self._idle(branch, cell, buffers._replace(gradients=gradients))

    def _embedding(
        self, branch: Branch, cell: Cell, buffers: Buffers, cotangent: jax.Array
    ) -> tuple[Buffers, jax.Array]:
        """The first chunk ends its backward in the embedding."""
        if not branch.first:
            return buffers, cotangent
        tokens = self.tokens[cell.microbatch]
        (found,) = jax.vjp(lambda outer: self.stage.embed(outer, tokens), self.outer)[1](cotangent)
        return buffers._replace(gradients=self._added(buffers.gradients, found)), cotangent

    def _exchange(self, buffers: Buffers, out: jax.Array, cell: Cell, tick: jax.Array) -> Buffers:
        """Pass what this tick made to the neighbours, and keep what arrives."""
        transfers = self.table.transfers
        if not any(t.forward or t.backward for t in transfers):
            return buffers
        moves = [
            lambda x, t=t: (_permute(x, self.axis, t.forward), _permute(x, self.axis, t.backward))
            for t in transfers
        ]
        with jax.named_scope("pipeline"):
            which = jnp.asarray(self.table.transfer, jnp.int32)[tick]
            x, cotangent = moves[0](out) if len(moves) == 1 else jax.lax.switch(which, moves, out)
        stash = _keep(buffers.stash, x, cell.receive_stash, jnp.int32(0))
        cotangents = _keep(buffers.cotangents, cotangent, cell.receive_cotangent)
        return buffers._replace(stash=stash, cotangents=cotangents)

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
                LAYERS + path: _write(gradients[LAYERS + path], _read(gradients[LAYERS + path], slot) + array, slot)
                for path, array in found.items()
            }
        return {**gradients, **sums}

    def _empty(self) -> Buffers:
        """All buffers, zero, where they live."""
        x = jax.eval_shape(self.stage.embed, self.outer, self.tokens[0])
        zero = jnp.int32(0)
        pairs = Factors((), ())
        if self.table.pair_slots:
            layer = {path.removeprefix(LAYERS): array[0] for path, array in self.layers.items()}
            pairs = jax.eval_shape(self.stage.input_gradient, layer, x, x)[2]
        del zero
        stack = (self.table.pair_slots, self.chunk_slots)
        stash = jnp.zeros((self.table.stash_slots, self.chunk_slots, *x.shape), x.dtype)
        return Buffers(
            stash=self.place("stash", stash),
            cotangents=self.place("cotangents", jnp.zeros((self.table.cotangent_slots, *x.shape), x.dtype)),
            pairs=jax.tree.map(lambda leaf: jnp.zeros((*stack, *leaf.shape), leaf.dtype), pairs),
            gradients={
                path: self.place(path, jnp.zeros_like(array))
                for path, array in {**self.layers, **self.outer}.items()
            },
            loss=jnp.zeros((), jnp.float32),
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
    return jax.lax.dynamic_update_slice(buffer, value.astype(buffer.dtype).reshape((1,) * len(index) + value.shape), start)


def _keep(buffer: jax.Array, value: jax.Array, slot: jax.Array, *index: jax.Array) -> jax.Array:
    """`_write`, unless the slot is -1: then nothing has arrived."""
    at = (jnp.maximum(slot, 0), *index)
    return _write(buffer, jnp.where(slot >= 0, value, _read(buffer, *at)), *at)


def _permute(x: jax.Array, axis: str, edges: Edges) -> jax.Array:
    return jax.lax.ppermute(x, axis, edges) if edges else jnp.zeros_like(x)
