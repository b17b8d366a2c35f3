"""The decoder-only transformer: embedding, layers (scanned or unrolled), final norm, head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from shardlab.model.attention import MASKED
from shardlab.model.cache import Cached, Caches, Slots, last_of, sees_all
from shardlab.model.experts import Load
from shardlab.model.groups import Body, scan_in_groups
from shardlab.model.layer import Layer
from shardlab.model.layers import Norm, Projection, parameter, weight
from shardlab.model.loss import in_parts
from shardlab.model.runtime import Runtime, gathered_tokens, unrolled
from shardlab.spec.models import ModelConfig, Stack

# Path (`layers/attention/query/kernel`) -> array. The paths are those of `spec.params.parameter_table`.
Params = dict[str, jax.Array]

# What the layers keep of tokens: keys and values [N, B, S, K, D], or latent vectors [N, B, S, C]; where there
# are layers of two kinds, those of each by its name.
Cache = Cached | dict[str, Cached]

# Of layers: what they cache where that is wanted, the load where there are experts.
Kept = tuple[Cached | None, Load | None]

Module = TypeVar("Module", bound=nnx.Module)


class Table(nnx.Module):
    """One embedding vector per row: tokens or positions."""

    def __init__(self, rows: int, embed: int, row_axis: str | None, *, rngs: nnx.Rngs) -> None:
        # GPT-2's initialisation: normal with std 0.02.
        self.table = parameter(jax.random.normal(rngs.params(), (rows, embed)) * 0.02, (row_axis, "embed"))


class Transformer(nnx.Module):
    """Llama, GPT-2, Mixtral, DeepSeek or Gemma, as `ModelConfig` says. Callable: tokens_BxL -> logits_BxLxV
    in f32, padding masked."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, scan_layers: bool = True) -> None:
        """rngs: needs the stream `params`. scan_layers: one stack of layer parameters, run by lax.scan."""
        self.config, self.scan_layers = config, scan_layers
        self.embedding = Table(config.padded_vocab, config.embed, "vocab", rngs=rngs)
        if config.positions == "learned":
            self.positions = Table(config.context, config.embed, None, rngs=rngs)
        for stack in config.stacks:
            setattr(self, stack.name, _layers(stack, scan_layers, rngs))
        self.final_norm = Norm(config)
        if not config.tied_embeddings:
            out = {"vocab": config.padded_vocab}
            self.head = Projection({"embed": config.embed}, out, bias=False, rngs=rngs)

    def __call__(self, tokens_BxL: jax.Array, run: Runtime) -> jax.Array:
        """Logits of every position."""
        return self.logits_and_load(tokens_BxL, run)[0]

    def logits_and_load(self, tokens_BxL: jax.Array, run: Runtime) -> tuple[jax.Array, Load | None]:
        """Logits of every position, and the load of the experts of all layers [N, G, X], where there are
        any."""
        table_VxE = self._table(run)
        x_BxLxE, load = self._states(table_VxE, tokens_BxL, run)
        return self._logits(table_VxE, x_BxLxE, run), load

    def loss_and_load(
        self,
        tokens_BxL: jax.Array,
        targets_BxL: jax.Array,
        run: Runtime,
        *,
        z_loss: float = 0.0,
        parts: int = 1,
    ) -> tuple[jax.Array, Load | None]:
        """Mean cross-entropy, and the load as `logits_and_load` has it. parts: of the tokens, of which one
        has logits at a time."""
        table_VxE = self._table(run)
        x_BxLxE, load = self._states(table_VxE, tokens_BxL, run)
        if parts == 1:
            return run.loss(self._logits(table_VxE, x_BxLxE, run), targets_BxL, z_loss=z_loss), load
        tied = self.config.tied_embeddings
        head, product = (table_VxE, "ble,ve->blv") if tied else (weight(self.head.kernel, run), "ble,ev->blv")

        def loss_of(head: jax.Array, x_BxLxE: jax.Array, targets_BxL: jax.Array) -> jax.Array:
            with jax.named_scope("head"):
                logits = self._masked(jnp.einsum(product, x_BxLxE, head), run)
            return run.loss(logits, targets_BxL, z_loss=z_loss)

        return in_parts(loss_of, parts, head, x_BxLxE, targets_BxL), load

    def _states(
        self, table_VxE: jax.Array, tokens_BxL: jax.Array, run: Runtime
    ) -> tuple[jax.Array, Load | None]:
        """What the head takes, x_BxLxE, and the load."""
        position_L = run.positions_of(tokens_BxL.shape[1])
        x_BxLxE = self._embed(table_VxE, tokens_BxL, position_L, run)
        x_BxLxE, _, load = self._through_layers(x_BxLxE, position_L, run)
        return self._final(x_BxLxE, run), load

    def prefill(self, tokens_BxL: jax.Array, run: Runtime) -> tuple[jax.Array, Cache]:
        """Logits of the last position [B, V], and the cache of the prompt (see `Cache`)."""
        position_L = run.positions_of(tokens_BxL.shape[1])
        table_VxE = self._table(run)
        x_BxLxE = self._embed(table_VxE, tokens_BxL, position_L, run)
        x_BxLxE, cache, _ = self._through_layers(x_BxLxE, position_L, run, keep=True)
        assert cache is not None
        last_Bx1xE = run.last_token(self._final(x_BxLxE, run))
        return self._logits(table_VxE, last_Bx1xE, run)[:, 0], cache

    def decode(self, slots: Slots, cache: Cache, run: Runtime) -> tuple[jax.Array, Cache]:
        """New tokens of each slot after a cache (see `Cache`): logits of the last [B, V], the new cache."""
        position_BxL = slots.position[:, None] + jnp.arange(slots.tokens.shape[1])[None]
        table_VxE = self._table(run)
        x_BxLxE = self._embed(table_VxE, slots.tokens, position_BxL, run)
        x_BxLxE, new_cache, _ = self._through_layers(x_BxLxE, position_BxL, run, cache=cache)
        assert new_cache is not None
        last_Bx1xE = last_of(self._final(x_BxLxE, run), slots.count)
        return self._logits(table_VxE, last_Bx1xE, run)[:, 0], new_cache

    def embed(self, tokens_BxL: jax.Array, run: Runtime) -> jax.Array:
        """What the first layer gets: x_BxLxE."""
        return self._embed(self._table(run), tokens_BxL, run.positions_of(tokens_BxL.shape[1]), run)

    def logits(self, x_BxLxE: jax.Array, run: Runtime) -> jax.Array:
        """Of what the last layer gives: final norm and head."""
        return self._logits(self._table(run), self._final(x_BxLxE, run), run)

    def _table(self, run: Runtime) -> jax.Array:
        """The token embedding, placed once: where it is also the head, its two gradients add up before one
        reduction."""
        with jax.named_scope("embedding"):
            return weight(self.embedding.table, run)

    def _logits(self, table_VxE: jax.Array, x_BxLxE: jax.Array, run: Runtime) -> jax.Array:
        """x_BxLxE -> logits_BxLxV in f32; the vocabulary's padding gets no probability mass."""
        with jax.named_scope("head"):
            if self.config.tied_embeddings:
                logits = jnp.einsum("ble,ve->blv", x_BxLxE, table_VxE)
            else:
                logits = self.head(x_BxLxE, run)
            return self._masked(logits, run)

    def _masked(self, logits_BxLxV: jax.Array, run: Runtime) -> jax.Array:
        logits_BxLxV = run.constrain(logits_BxLxV, ("batch", "seq", "vocab")).astype(jnp.float32)
        if self.config.padded_vocab == self.config.vocab:
            return logits_BxLxV
        real_V = jnp.arange(self.config.padded_vocab) < self.config.vocab
        return jnp.where(real_V[None, None], logits_BxLxV, MASKED)

    def _embed(
        self, table_VxE: jax.Array, tokens_BxL: jax.Array, position: jax.Array, run: Runtime
    ) -> jax.Array:
        """x_BxLxE of tokens at `position`, [L] or [B, L]."""
        with jax.named_scope("embedding"):
            x_BxLxE = run.lookup(table_VxE, tokens_BxL)
            if self.config.scaled_embedding:
                x_BxLxE = x_BxLxE * self.config.embed**0.5
            if self.config.positions == "learned":
                positions = weight(self.positions.table, run)
                if run.positions is None and position.ndim == 1:
                    rows = jax.lax.dynamic_slice_in_dim(positions, position[0], position.shape[0])[None]
                else:
                    rows = positions.at[jnp.atleast_2d(position)].get(mode="clip")
                x_BxLxE = x_BxLxE + rows
            return run.constrain(x_BxLxE, ("batch", "norm_seq", "embed"))

    def _final(self, x_BxLxE: jax.Array, run: Runtime) -> jax.Array:
        with jax.named_scope("final_norm"):
            return gathered_tokens(self.final_norm(x_BxLxE, run), run)

    def _through_layers(
        self,
        x_BxLxE: jax.Array,
        position: jax.Array,
        run: Runtime,
        *,
        cache: Cache | None = None,
        keep: bool = False,
    ) -> tuple[jax.Array, Cache | None, Load | None]:
        """All layers in turn, what they cache (if keep, or after a cache), and the load of their experts,
        stacked. position: [L], or [B, L] after a cache."""
        kept: dict[str, Cached] = {}
        load: Load | None = None
        for stack in self.config.stacks:
            layers = getattr(self, stack.name)
            held = cache.get(stack.name) if isinstance(cache, dict) else cache
            with jax.named_scope(stack.name):
                if held is not None:
                    x_BxLxE, kept[stack.name] = self._through_cached(layers, x_BxLxE, position, run, held)
                    continue
                x_BxLxE, (new, found) = self._through(layers, x_BxLxE, position, run, keep)
            load = found if found is not None else load
            if new is not None:
                kept[stack.name] = new
        return x_BxLxE, next(iter(kept.values()), None) if len(kept) < 2 else kept, load

    def _through(
        self,
        layers: Layer | nnx.List[Layer],
        x_BxLxE: jax.Array,
        position_L: jax.Array,
        run: Runtime,
        keep: bool,
    ) -> tuple[jax.Array, Kept]:
        """The layers of one kind."""
        graph, state = nnx.split(layers if isinstance(layers, Layer) else layers[0])

        def layer(run: Runtime, x: jax.Array, state: nnx.State) -> tuple[jax.Array, Kept]:
            x, cached, load = nnx.merge(graph, state)(x, position_L, run)
            return x, (cached if keep else None, load)

        def body_of(index: int) -> Body[nnx.State, Kept]:
            if not self.config.sees_all(index):
                return partial(layer, run)
            return partial(layer, replace(run, attention=run.global_attention, sees_all=True))

        if isinstance(layers, Layer):
            bodies = [body_of(place) for place in range(self.config.global_every or 1)]
            return scan_in_groups(bodies, x_BxLxE, state, run.remat)
        kept = []
        for index, module in enumerate(layers):
            body = unrolled(body_of(index), run)
            with jax.named_scope(str(index)):
                x_BxLxE, left = body(x_BxLxE, nnx.split(module)[1])
            kept.append(left)
        return x_BxLxE, jax.tree.map(lambda *a: jnp.stack(a), *kept)

    def _through_cached(
        self,
        layers: Layer | nnx.List[Layer],
        x_BxLxE: jax.Array,
        position_BxL: jax.Array,
        run: Runtime,
        cache: Cached,
    ) -> tuple[jax.Array, Cached]:
        """The layers of one kind, which write and read their cache [N, B, S, …] in place."""
        if not isinstance(layers, Layer):
            for index, module in enumerate(layers):
                own = replace(run, sees_all=self.config.sees_all(index))
                with jax.named_scope(str(index)):
                    x_BxLxE, cache, _ = module(x_BxLxE, position_BxL, own, Caches(cache, jnp.int32(index)))
            return x_BxLxE, cache
        graph, state = nnx.split(layers)

        def layer(
            carry: tuple[jax.Array, Cached], inputs: tuple[nnx.State, jax.Array]
        ) -> tuple[tuple[jax.Array, Cached], None]:
            own = replace(run, sees_all=sees_all(self.config, inputs[1]))
            x, cache, _ = nnx.merge(graph, inputs[0])(
                carry[0], position_BxL, own, Caches(carry[1], inputs[1])
            )
            return (x, cache), None

        index_N = jnp.arange(jax.tree.leaves(cache)[0].shape[0], dtype=jnp.int32)
        return jax.lax.scan(layer, (x_BxLxE, cache), (state, index_N))[0]


def _layers(stack: Stack, scan_layers: bool, rngs: nnx.Rngs) -> Layer | nnx.List[Layer]:
    """The layers of one kind: a stack of each parameter, or one after the other."""
    if scan_layers:
        return Layer(stack.config, rngs=rngs, stack=(stack.layers,))
    return nnx.List([Layer(stack.config, rngs=rngs) for _ in range(stack.layers)])


def abstract_model(config: ModelConfig, *, scan_layers: bool = True) -> Transformer:
    """The model with shapes in place of arrays: allocates nothing."""
    return nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(params=0), scan_layers=scan_layers))


def to_params(model: Transformer) -> Params:
    """The model's arrays (or abstract shapes) by path."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {"/".join(map(str, path)): variable.get_value() for path, variable in flat}


def as_used(model: Transformer, params: Params, run: Runtime) -> Params:
    """The parameters cast to what they are used in: f32 for norms and routers, else the compute type."""
    in_f32 = {
        "/".join(map(str, path)): variable.in_f32
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }

    def cast(path: str, array: jax.Array) -> jax.Array:
        return array.astype(jnp.float32 if in_f32[path] else run.compute_dtype)

    return {path: jax.tree.map(partial(cast, path), arrays) for path, arrays in params.items()}


def init_params(config: ModelConfig, key: jax.Array, *, scan_layers: bool = True) -> Params:
    """Fresh f32 parameters. Pure: jit it with out_shardings to create them where they live."""
    return to_params(Transformer(config, rngs=nnx.Rngs(params=key), scan_layers=scan_layers))


def with_params(abstract: Module, params: Mapping[str, jax.Array]) -> Module:
    """The model of `abstract` (see `abstract_model`), or a part of it, with these arrays. Raises KeyError
    when one is missing."""
    graph, state = nnx.split(abstract)
    flat = [
        (path, variable.replace(params["/".join(map(str, path))]))
        for path, variable in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(flat))
