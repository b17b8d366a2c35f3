"""The executor of pipeline schedules: one loop over ticks, one branch per kind of work item.

Every schedule runs here; what differs is the table (spec/tick_table.py). Forward and backward are both
written out, so a stage keeps what its layers keep (the plan's remat policy) of the microbatches in flight,
and nothing else: differentiating the loop would keep every tick's activations, which is GPipe's memory
whatever the schedule.

Layers are a loop over stacks of their parameters, or written out one after the other, each with arrays of
its own: then a chunk is a branch too. Out of a stack the compiler may copy a layer's weights before it
multiplies, and a gradient is found before it is added to its sum; an array of its own is multiplied as it
is, and the sum is part of the product.

Stages with fewer layers are branches of their own with a loop of their own length: a masked slot would cost
a layer's time, and a loop whose length depends on the device cannot be counted in the compiled program.

Each stage takes its own branch. So collectives in branches stay within a stage (tensor parallelism, FSDP),
and what passes between stages does so after the branches, at every tick.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from shardlab.model.transformer import Params
from shardlab.parallel.buffers import Buffer, Index, add, first, keep, of_slot, read, write
from shardlab.parallel.residuals import Residuals
from shardlab.parallel.stage import LAYERS, Factors, StageModel, Stream
from shardlab.spec.tick_table import Branch, Column, Edges, TickTable, Transfer

Place = Callable[[str, jax.Array], jax.Array]


class Inbox(NamedTuple):
    """What a stage gets, until it uses it: written between ticks, only read by the branches.

    A buffer that branches write as well would be copied whole in each of them. inputs: of chunks' first
    layers [slots, …]. cotangents: of a chunk's output [slots, …].
    """

    inputs: Stream
    cotangents: Stream


class Sums(NamedTuple):
    """What branches alone write. gradients: by path, as the parameters lie. loss: f32 scalar.

    stash: what layers keep from forward to backward [slots, layers, …]. pairs: factors of kernels' gradients
    [slots, layers, …], empty unless backwards are split. A loop that reads one of them hands it on as well
    (behind a barrier, or JAX would take it out of the loop again): a branch that returned what its loop only
    read would be given a copy of the whole.
    """

    gradients: Params
    loss: jax.Array
    stash: Residuals
    pairs: Factors


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
    input: jax.Array
    receive_input: jax.Array
    receive_cotangent: jax.Array
    keep_cotangent: jax.Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Executor:
    """One stage's program. layers: the stage's layer parameters by path, stacked [slots, …] or, where layers
    are written out, an array for each slot; outer: the rest; both in the type that they are used in, cast
    once for all microbatches.

    tokens, targets: [microbatches, B, L]. chunk_slots: layer slots of a chunk. axis: the mesh axis of the
    stages. place: pins a part of the stream ("x") between stages or a gradient (by path) to where the plan
    wants it. arriving, leaving: take the stream from there to where the layers have it, and back.
    sum_dtype: of the gradients' sums.
    """

    stage: StageModel
    table: TickTable
    axis: str
    chunk_slots: int
    layers: Mapping[str, jax.Array | tuple[jax.Array, ...]]
    outer: Params
    tokens: jax.Array
    targets: jax.Array
    place: Place
    sum_dtype: DTypeLike
    arriving: Callable[[Stream], Stream]
    leaving: Callable[[Stream], Stream]

    def run(self) -> tuple[jax.Array, Params]:
        """The loss and the gradients of this stage, means over the microbatches."""
        stage = jax.lax.axis_index(self.axis)

        def tick(carry: Carry, tick: jax.Array) -> tuple[Carry, None]:
            inbox, sums, arrived = carry
            cell = Cell(*(_lookup(getattr(self.table, name), tick, stage) for name in Cell._fields))
            inbox = _received(inbox, arrived, cell)
            branches = [self._branch(branch, cell, inbox) for branch in self.table.branches]
            sums, out = jax.lax.switch(cell.branch, branches, sums)
            inbox = inbox._replace(cotangents=keep(inbox.cotangents, out, cell.keep_cotangent))
            return (inbox, sums, self._exchange(out, tick)), None

        ticks = jnp.arange(len(self.table.branch), dtype=jnp.int32)
        (_, sums, _), _ = jax.lax.scan(tick, self._start(), ticks)
        stacked = {path: jnp.stack(a) if isinstance(a, tuple) else a for path, a in sums.gradients.items()}
        return sums.loss, stacked

    def _branch(self, branch: Branch, cell: Cell, inbox: Inbox) -> Callable[[Sums], tuple[Sums, Stream]]:
        """The work of a tick: what it makes is an activation or a cotangent, or zeros."""
        work = {"idle": self._idle, "F": self._forward, "B": self._backward, "W": self._weights}

        def run(sums: Sums) -> tuple[Sums, Stream]:
            sums, out = work[branch.kind](branch, cell, inbox, sums)
            return sums, self.leaving(out)

        return run

    def _idle(self, _: Branch, cell: Cell, inbox: Inbox, sums: Sums) -> tuple[Sums, Stream]:
        return sums, _nothing(inbox)

    def _forward(self, branch: Branch, cell: Cell, inbox: Inbox, sums: Sums) -> tuple[Sums, Stream]:
        """The layers of a chunk; the last chunk goes on to the loss, and makes its gradient."""
        if branch.first:
            x = jax.vjp(self.stage.embed, self.outer, self.tokens[cell.microbatch])[0]
        else:
            x = self.arriving(read(inbox.inputs, cell.input))

        def layer(carry: tuple[Stream, Residuals], i: Index) -> tuple[tuple[Stream, Residuals], None]:
            x, stash = carry
            x, kept = self.stage.forward(self._layer(self._slot(branch, cell) + i), x)
            return (x, write(stash, kept, cell.stash, i)), None

        x, stash = self._through(layer, (x, sums.stash), branch)
        sums = sums._replace(stash=stash)
        return self._loss(cell, sums, x) if branch.last else (sums, x)

    def _loss(self, cell: Cell, sums: Sums, x: Stream) -> tuple[Sums, Stream]:
        """Head and loss of one microbatch, and the gradient of x."""
        targets = self.targets[cell.microbatch]
        share = 1.0 / self.targets.shape[0]
        loss, pull = jax.vjp(lambda outer, x: self.stage.loss(outer, x, targets), self.outer, x)
        found, cotangent = pull(jnp.asarray(share, loss.dtype))
        gradients = self._added(sums.gradients, found)
        return sums._replace(gradients=gradients, loss=sums.loss + loss * share), cotangent

    def _backward(self, branch: Branch, cell: Cell, inbox: Inbox, sums: Sums) -> tuple[Sums, Stream]:
        """The layers of a chunk from the last to the first, each from what it kept. Where the backward is
        split, the kernels' gradients stay undone: their factors are kept."""

        def layer(carry: tuple[Sums, Stream, Index], i: Index) -> tuple[Any, None]:
            sums, cotangent, at = carry
            slot = at if isinstance(at, int) else jax.lax.optimization_barrier(at)
            kept = read(sums.stash, cell.stash, i)
            if not self._scanned and branch.layers == 1:
                # Taken out once: with nothing after it, XLA keeps the stash to read from, and returns a copy.
                kept = jax.lax.optimization_barrier(kept)
            found, cotangent, factors = self.stage.backward(self._layer(slot), kept, cotangent)
            sums = sums._replace(
                gradients=self._added(sums.gradients, found, slot),
                stash=jax.lax.optimization_barrier(sums.stash),
                pairs=write(sums.pairs, factors, cell.pair, i),
            )
            return (sums, cotangent, at - 1), None

        start = (
            sums,
            self.arriving(read(inbox.cotangents, cell.cotangent)),
            self._slot(branch, cell) + branch.layers - 1,
        )
        sums, cotangent, _ = self._through(layer, start, branch, reverse=True)
        if branch.first:  # which ends in the embedding
            tokens = self.tokens[cell.microbatch]
            (found,) = jax.vjp(lambda outer: self.stage.embed(outer, tokens), self.outer)[1](cotangent)
            sums, cotangent = sums._replace(gradients=self._added(sums.gradients, found)), _nothing(inbox)
        return sums, cotangent

    def _weights(self, branch: Branch, cell: Cell, inbox: Inbox, sums: Sums) -> tuple[Sums, Stream]:
        """The kernels' gradients of a chunk."""

        def layer(carry: tuple[Sums, Index], i: Index) -> tuple[Any, None]:
            sums, slot = carry
            factors = read(sums.pairs, cell.pair, i)
            found = self.stage.kernel_gradients(self._layer(slot), first(inbox.cotangents), factors)
            sums = sums._replace(
                gradients=self._added(sums.gradients, found, slot),
                pairs=jax.lax.optimization_barrier(sums.pairs),
            )
            return (sums, slot + 1), None

        sums, _ = self._through(layer, (sums, self._slot(branch, cell)), branch)
        return sums, _nothing(inbox)

    def _exchange(self, out: Stream, tick: jax.Array) -> Arrived:
        """Pass what this tick made to the neighbours."""
        moves = [lambda x, t=t: _moved(x, self.axis, t) for t in self.table.transfers]
        with jax.named_scope("pipeline"):
            if len(moves) == 1:
                return moves[0](out)
            return jax.lax.switch(jnp.asarray(self.table.transfer, jnp.int32)[tick], moves, out)

    @property
    def _scanned(self) -> bool:
        return not any(isinstance(arrays, tuple) for arrays in self.layers.values())

    def _through(
        self, layer: Callable[[Any, Any], tuple[Any, None]], carry: Any, branch: Branch, reverse: bool = False
    ) -> Any:
        """The layers of a chunk, in a loop or written out."""
        with jax.named_scope("layers"):
            if self._scanned:
                count = jnp.arange(branch.layers, dtype=jnp.int32)
                return jax.lax.scan(layer, carry, count, reverse=reverse)[0]
            for i in reversed(range(branch.layers)) if reverse else range(branch.layers):
                carry, _ = layer(carry, i)
            return carry

    def _slot(self, branch: Branch, cell: Cell) -> Index:
        """Of the first layer of the item's chunk."""
        return (cell.chunk if self._scanned else branch.chunk) * self.chunk_slots

    def _layer(self, slot: Index) -> Params:
        """A layer's parameters, by path relative to the layer."""
        return {path.removeprefix(LAYERS): of_slot(arrays, slot) for path, arrays in self.layers.items()}

    def _added(self, gradients: Params, found: Params, slot: Index | None = None) -> Params:
        """The sums with these gradients: of the layer in this slot, or of parameters of no layer."""
        if slot is None:
            sums = {path: gradients[path] + array.astype(self.sum_dtype) for path, array in found.items()}
            return {**gradients, **sums}
        sums = {LAYERS + path: add(gradients[LAYERS + path], array, slot) for path, array in found.items()}
        return {**gradients, **sums}

    def _start(self) -> Carry:
        """All buffers, zero, where they live."""
        x = jax.eval_shape(self.stage.embed, self.outer, self.tokens[0])
        layer = {path.removeprefix(LAYERS): arrays[0] for path, arrays in self.layers.items()}
        kept = jax.eval_shape(self.stage.forward, layer, x)[1]
        pairs = jax.eval_shape(self.stage.backward, layer, kept, x)[2]
        gradients = {
            path: jax.tree.map(lambda a, p=path: self.place(p, jnp.zeros(a.shape, self.sum_dtype)), arrays)
            for path, arrays in {**self.layers, **self.outer}.items()
        }
        inbox = Inbox(self._zeros(x, self.table.input_slots), self._zeros(x, self.table.cotangent_slots))
        nothing = self._zeros(x)
        stash, pairs = self._stack(kept, self.table.stash_slots), self._stack(pairs, self.table.pair_slots)
        sums = Sums(gradients, jnp.zeros((), jnp.float32), stash, pairs)
        return inbox, sums, Arrived(nothing, nothing)

    def _stack(self, like: Buffer, slots: int) -> Buffer:
        """A buffer of what each layer of a chunk keeps."""
        leading = (slots, self.chunk_slots)
        return jax.tree.map(lambda leaf: jnp.zeros((*leading, *leaf.shape), leaf.dtype), like)

    def _zeros(self, like: Stream, *leading: int) -> Stream:
        """A buffer of streams, where it lives."""

        def zeros(name: str, leaf: jax.ShapeDtypeStruct | None) -> jax.Array | None:
            return None if leaf is None else self.place(name, jnp.zeros((*leading, *leaf.shape), leaf.dtype))

        return Stream(*(zeros(name, leaf) for name, leaf in zip(Stream._fields, like, strict=True)))


def _nothing(inbox: Inbox) -> Stream:
    """What a tick makes that gives its neighbours nothing."""
    return jax.tree.map(jnp.zeros_like, first(inbox.cotangents))


def _received(inbox: Inbox, arrived: Arrived, cell: Cell) -> Inbox:
    """The inbox with what has arrived, where the table says."""
    return Inbox(
        inputs=keep(inbox.inputs, arrived.stream, cell.receive_input),
        cotangents=keep(inbox.cotangents, arrived.cotangent, cell.receive_cotangent),
    )


def _lookup(column: Column, tick: jax.Array, stage: jax.Array) -> jax.Array:
    return jnp.asarray(column, jnp.int32)[tick, stage]


def _moved(out: Stream, axis: str, transfer: Transfer) -> Arrived:
    """In one permute where nobody sends or gets twice: what arrives is then one thing or the other."""
    if transfer.is_permutation:
        arrived = _permute(out, axis, transfer.forward + transfer.backward)
        return Arrived(arrived, arrived)
    return Arrived(_permute(out, axis, transfer.forward), _permute(out, axis, transfer.backward))


def _permute(out: Stream, axis: str, edges: Edges) -> Stream:
    return jax.tree.map(lambda a: jax.lax.ppermute(a, axis, edges) if edges else jnp.zeros_like(a), out)
