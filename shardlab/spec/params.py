"""Every parameter of a model as a value: path, shape, logical axes. Pure Python: judges plans without jax.

`model/transformer.py` builds exactly these arrays; a test holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from shardlab.spec.models import ModelConfig
from shardlab.spec.stages import StageLayout

LogicalAxes = tuple[str | None, ...]


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """One parameter array.

    path: attribute names joined with `/` (`layers/attention/query/kernel`; unrolled: `layers/0/attention/…`).
    shape: elements per dimension. axes: one logical axis per dimension, None where no rule can shard it.
    """

    path: str
    shape: tuple[int, ...]
    axes: LogicalAxes

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


def parameter_table(
    config: ModelConfig, *, scan_layers: bool = True, stages: StageLayout | None = None
) -> tuple[ParamSpec, ...]:
    """Every parameter of `config`, in the order of the forward pass.

    scan_layers: each layer parameter is one stack with a leading `layers` axis; else one array per layer.
    stages: of a pipeline; each layer parameter is one stack [stages, slots, …], and scan_layers does not
    count.
    """
    layers = [
        spec
        for stack in config.stacks
        for spec in _stacked(stack.name, stack.layers, _layer_table(stack.config), scan_layers, stages)
    ]
    table = [ParamSpec("embedding/table", (config.padded_vocab, config.embed), ("vocab", "embed"))]
    if config.positions == "learned":
        table.append(ParamSpec("positions/table", (config.context, config.embed), (None, "embed")))
    table += [*layers, *_norm("final_norm", config)]
    if not config.tied_embeddings:
        table.append(ParamSpec("head/kernel", (config.embed, config.padded_vocab), ("embed", "vocab")))
    return tuple(table)


def _stacked(
    name: str, layers: int, table: list[ParamSpec], scan_layers: bool, stages: StageLayout | None
) -> list[ParamSpec]:
    """The parameters of all layers of one kind, given those of one."""
    if stages is not None:
        stack = (stages.stages, stages.slots)
        return [
            ParamSpec(f"{name}/{p.path}", (*stack, *p.shape), ("stage", "layers", *p.axes)) for p in table
        ]
    if scan_layers:
        return [ParamSpec(f"{name}/{p.path}", (layers, *p.shape), ("layers", *p.axes)) for p in table]
    return [ParamSpec(f"{name}/{i}/{p.path}", p.shape, p.axes) for i in range(layers) for p in table]


def _layer_table(config: ModelConfig) -> list[ParamSpec]:
    """The parameters of one layer, paths relative to the layer."""
    table = [
        *_norm("attention_norm", config),
        *(_latent_attention(config) if config.latent else _attention(config)),
        *(_norm("attention_post_norm", config) if config.post_norms else ()),
        *_norm("mlp_norm", config),
    ]
    if not config.num_experts:
        after = _norm("mlp_post_norm", config) if config.post_norms else []
        return [*table, *_mlp("mlp", config, config.mlp), *after]
    shared = _mlp("shared", config, config.shared_experts * config.mlp) if config.shared_experts else []
    return [*table, *shared, *_experts(config)]


def _attention(config: ModelConfig) -> list[ParamSpec]:
    """Grouped queries."""
    E, H, K, D = config.embed, config.heads, config.kv_heads, config.head_dim
    normed = ("query", "key") if config.query_key_norms else ()
    return [
        *_projection("attention/query", (E,), ("embed",), (H, D), ("heads", "head_dim"), config),
        *_projection("attention/key", (E,), ("embed",), (K, D), ("kv_heads", "head_dim"), config),
        *_projection("attention/value", (E,), ("embed",), (K, D), ("kv_heads", "head_dim"), config),
        *(ParamSpec(f"attention/{name}_norm/scale", (D,), (None,)) for name in normed),
        *_projection("attention/output", (H, D), ("heads", "head_dim"), (E,), ("embed",), config),
    ]


def _latent_attention(config: ModelConfig) -> list[ParamSpec]:
    """Down to the latent vectors and up to the heads; a norm between. No biases."""
    to = config.latent
    assert to is not None
    E, H, D = config.embed, config.heads, config.head_dim
    up = ("latent", "heads", "head_dim")
    shared = to.kv_rank + to.rope_dim
    return [
        ParamSpec("attention/query_down/kernel", (E, to.query_rank), ("embed", None)),
        ParamSpec("attention/query_norm/scale", (to.query_rank,), (None,)),
        ParamSpec("attention/query_up/kernel", (to.query_rank, H, D), up),
        ParamSpec("attention/kv_down/kernel", (E, shared), ("embed", None)),
        ParamSpec("attention/kv_norm/scale", (to.kv_rank,), (None,)),
        ParamSpec("attention/kv_up/kernel", (to.kv_rank, H, to.nope_dim + to.value_dim), up),
        ParamSpec("attention/output/kernel", (H, to.value_dim, E), ("heads", "head_dim", "embed")),
    ]


def _mlp(path: str, config: ModelConfig, width: int) -> list[ParamSpec]:
    """Gate (SwiGLU, GeGLU), up and down."""
    E, names = config.embed, ("gate", "up") if config.gated else ("up",)
    inward = [
        spec
        for name in names
        for spec in _projection(f"{path}/{name}", (E,), ("embed",), (width,), ("mlp",), config)
    ]
    return [*inward, *_projection(f"{path}/down", (width,), ("mlp",), (E,), ("embed",), config)]


def _experts(config: ModelConfig) -> list[ParamSpec]:
    """The router, and the kernels of all experts of a layer in one array each (SwiGLU, no biases)."""
    X, E, M = config.num_experts, config.embed, config.mlp
    bias = [ParamSpec("moe/router/bias", (X,), (None,))] if config.router_bias else []
    return [
        ParamSpec("moe/router/kernel", (E, X), ("embed", None)),
        *bias,
        ParamSpec("moe/gate/kernel", (X, E, M), ("expert", "embed", "mlp")),
        ParamSpec("moe/up/kernel", (X, E, M), ("expert", "embed", "mlp")),
        ParamSpec("moe/down/kernel", (X, M, E), ("expert", "mlp", "embed")),
    ]


def _norm(path: str, config: ModelConfig) -> list[ParamSpec]:
    """A scale, and a bias for LayerNorm."""
    names = ("scale", "bias") if config.norm == "layernorm" else ("scale",)
    return [ParamSpec(f"{path}/{name}", (config.embed,), ("embed",)) for name in names]


def _projection(
    path: str,
    inputs: tuple[int, ...],
    input_axes: LogicalAxes,
    outputs: tuple[int, ...],
    output_axes: LogicalAxes,
    config: ModelConfig,
) -> list[ParamSpec]:
    """A kernel [*inputs, *outputs], and a bias [*outputs] where the model has biases."""
    table = [ParamSpec(f"{path}/kernel", (*inputs, *outputs), (*input_axes, *output_axes))]
    if config.bias:
        table.append(ParamSpec(f"{path}/bias", outputs, output_axes))
    return table
