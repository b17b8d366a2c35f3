"""Numbers of parameters, counted from a model's dimensions alone."""

from __future__ import annotations

from shardlab.spec.model_config import ModelConfig


def num_params(config: ModelConfig, *, padded: bool = False) -> int:
    """Number of parameters, counted from the dimensions; with `padded` those of the stored (padded)
    vocabulary.

    Equal to the published counts: GPT-2 124,439,808; Llama 3 8B 8,030,261,248; Mixtral 8x7B 46,702,792,704;
    DeepSeek-V3 671,026,419,200, with the router's biases and without the multi-token prediction module.
    """
    vocab = config.padded_vocab if padded else config.vocab
    tables = vocab * config.embed * (1 if config.tied_embeddings else 2)
    positions = config.context * config.embed if config.positions == "learned" else 0
    layers = sum(stack.layers * _layer_params(stack.config) for stack in config.stacks)
    return tables + positions + _norm_params(config) + layers


def attention_weights(config: ModelConfig) -> int:
    """Elements of the kernels of one layer's attention."""
    E, H = config.embed, config.heads
    if config.latent is None:
        return E * config.head_dim * (2 * H + 2 * config.kv_heads)
    to = config.latent
    queries = to.query_rank * (E + H * config.head_dim)
    keys_values = E * (to.kv_rank + to.rope_dim) + to.kv_rank * H * (to.nope_dim + to.value_dim)
    return queries + keys_values + H * to.value_dim * E


def mlp_weights(config: ModelConfig, width: int) -> int:
    """Elements of the kernels of one MLP: gate (SwiGLU and GeGLU have one), up and down."""
    return (3 if config.gated else 2) * config.embed * width


def _norm_params(config: ModelConfig) -> int:
    return config.embed * (2 if config.norm == "layernorm" else 1)


def _layer_params(config: ModelConfig) -> int:
    """One layer: norms, attention's projections, and the MLP, or the experts, the shared ones and the
    router."""
    mlp = mlp_weights(config, config.mlp) * ((config.num_experts or 1) + config.shared_experts)
    router = (config.embed + config.router_bias) * config.num_experts
    ranks = config.latent.query_rank + config.latent.kv_rank if config.latent else 0
    norms = (4 if config.post_norms else 2) * _norm_params(config)
    heads = 2 * config.head_dim if config.query_key_norms else 0
    return norms + ranks + heads + attention_weights(config) + router + mlp + _biases(config)


def _biases(config: ModelConfig) -> int:
    """Of one layer's projections and MLP."""
    query, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    inward = 2 if config.gated else 1  # gate and up, or up alone
    return (query + 2 * kv + config.embed) + (inward * config.mlp + config.embed) if config.bias else 0
