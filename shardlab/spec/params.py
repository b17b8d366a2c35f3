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
    layer = _layer_table(config)
    if stages is not None:
        stack = (stages.stages, stages.slots)
        layers = [
            ParamSpec(f"layers/{p.path}", (*stack, *p.shape), ("stage", "layers", *p.axes)) for p in layer
        ]
    elif scan_layers:
        layers = [
            ParamSpec(f"layers/{p.path}", (config.layers, *p.shape), ("layers", *p.axes)) for p in layer
        ]
    else:
        layers = [
            ParamSpec(f"layers/{i}/{p.path}", p.shape, p.axes) for i in range(config.layers) for p in layer
        ]
    table = [ParamSpec("embedding/table", (config.padded_vocab, config.embed), ("vocab", "embed"))]
    if config.positions == "learned":
        table.append(ParamSpec("positions/table", (config.context, config.embed), (None, "embed")))
    table += [*layers, *_norm("final_norm", config)]
    if not config.tied_embeddings:
        table.append(ParamSpec("head/kernel", (config.embed, config.padded_vocab), ("embed", "vocab")))
    return tuple(table)


def _layer_table(config: ModelConfig) -> list[ParamSpec]:
    """The parameters of one layer, paths relative to the layer."""
    E, H, K, D, M = config.embed, config.heads, config.kv_heads, config.head_dim, config.mlp
    table = [
        *_norm("attention_norm", config),
        *_projection("attention/query", (E,), ("embed",), (H, D), ("heads", "head_dim"), config),
        *_projection("attention/key", (E,), ("embed",), (K, D), ("kv_heads", "head_dim"), config),
        *_projection("attention/value", (E,), ("embed",), (K, D), ("kv_heads", "head_dim"), config),
        *_projection("attention/output", (H, D), ("heads", "head_dim"), (E,), ("embed",), config),
        *_norm("mlp_norm", config),
    ]
    if config.num_experts:
        return [*table, *_experts(config)]
    if config.activation == "swiglu":
        table += _projection("mlp/gate", (E,), ("embed",), (M,), ("mlp",), config)
    table += _projection("mlp/up", (E,), ("embed",), (M,), ("mlp",), config)
    table += _projection("mlp/down", (M,), ("mlp",), (E,), ("embed",), config)
    return table


def _experts(config: ModelConfig) -> list[ParamSpec]:
    """The router, and the kernels of all experts of a layer in one array each (SwiGLU, no biases)."""
    X, E, M = config.num_experts, config.embed, config.mlp
    return [
        ParamSpec("moe/router/kernel", (E, X), ("embed", None)),
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
