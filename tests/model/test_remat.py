"""Rematerialisation by name: what a layer keeps, as closed forms of the dimensions.

That it trains as without: `tests/parallel/test_equal.py`."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from shardlab.errors import Infeasible
from shardlab.model.loss import cross_entropy
from shardlab.model.runtime import Runtime
from shardlab.model.transformer import Params, abstract_model, to_params, with_params
from shardlab.spec.case import make_case
from shardlab.spec.models import LatentAttention, ModelConfig, find_model
from shardlab.spec.plan import plan_from_text
from shardlab.spec.plan_schema import NamedRemat

BATCH, LENGTH = 2, 12
LLAMA = ModelConfig(
    name="small-llama",
    layers=3,
    embed=16,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp=40,
    vocab=100,
    context=16,
)
GPT2 = replace(LLAMA, name="gpt2", kv_heads=4, norm="layernorm", activation="gelu", positions="learned")
LATENT = replace(
    LLAMA,
    name="latent",
    kv_heads=4,
    latent=LatentAttention(query_rank=12, kv_rank=6, nope_dim=6, rope_dim=2, value_dim=10),
)
F32 = Runtime(compute_dtype=jnp.float32)


def loss_of(params: Params, config: ModelConfig, remat: Any) -> jax.Array:
    tokens = jax.random.randint(jax.random.key(7), (BATCH, LENGTH + 1), 0, config.vocab)
    model = with_params(abstract_model(config), params)
    return cross_entropy(model(tokens[:, :-1], replace(F32, remat=remat)), tokens[:, 1:])


def kept_numbers(config: ModelConfig, remat: Any) -> int:
    """Numbers that the pullback of the loss holds; nothing is computed."""
    params = to_params(abstract_model(config))
    pull = jax.eval_shape(lambda p: jax.vjp(lambda p: loss_of(p, config, remat), p)[1], params)
    return sum(leaf.size for leaf in jax.tree.leaves(pull))


def width(name: str, config: ModelConfig) -> int:
    """Numbers per token and layer."""
    head, value = config.head_dim, config.value_dim
    return {
        "input": 0,  # which is kept as it is
        "query": config.heads * head,
        "key": config.kv_heads * head,
        "value": config.kv_heads * value,
        "output": config.embed,
        "gate": config.mlp,
        "up": config.mlp,
        "down": 0,  # only enters a sum
    }[name]


@pytest.mark.parametrize("place", ["keep", "offload"])
@pytest.mark.parametrize(
    ("config", "names"),
    [
        *((LLAMA, (name,)) for name in ("input", "query", "key", "value", "output", "gate", "up", "down")),
        (GPT2, ("query", "up")),
        (LATENT, ("query", "key", "value", "output")),
    ],
    ids=lambda value: getattr(value, "name", None) or "-".join(value),
)
def test_a_layer_keeps_what_is_named(config: ModelConfig, names: tuple[str, ...], place: str) -> None:
    kept = kept_numbers(config, NamedRemat(**{place: list(names)}))
    tokens = config.layers * BATCH * LENGTH
    assert kept - kept_numbers(config, "full") == tokens * sum(width(name, config) for name in names)


def to_host(config: ModelConfig, remat: Any) -> list[str]:
    """The types of what moves to the host's memory in the gradient, of all layers."""
    params = to_params(abstract_model(config))
    lines = str(jax.make_jaxpr(jax.grad(lambda p: loss_of(p, config, remat)))(params)).splitlines()
    return [line.split()[0].partition(":")[2] for line in lines if "device_put" in line and "<host>" in line]


def test_only_what_is_offloaded_moves_to_the_host() -> None:
    assert to_host(LLAMA, NamedRemat(keep=["query", "key", "up"])) == []
    moved = to_host(LLAMA, NamedRemat(keep=["query"], offload=["input", "key"]))
    assert sorted(moved) == ["f32<host>[2,12,16]", "f32<host>[2,12,2,8]"]


PLAN = '[axes]\nfsdp = 8\n[activations]\nbatch = ["fsdp"]\n[method]\nremat = {{keep = ["{}"]}}\n'


@pytest.mark.parametrize(
    ("model", "name"), [("gpt2-124m", "gate"), ("mixtral-8x7b", "up"), ("deepseek-v3", None), ("tiny", None)]
)
def test_names_that_a_model_does_not_have_are_refused(model: str, name: str | None) -> None:
    plan = plan_from_text(PLAN.format(name or "gate"))
    if name is None:
        make_case(plan, model, "cpu:8", 8)
        return
    with pytest.raises(Infeasible, match=f"remat names {name!r}, which no layer of {model} has") as error:
        make_case(plan, model, "cpu:8", 8)
    assert "query" in error.value.nearest and name not in error.value.nearest.split(", ")
    make_case(plan, find_model(model), "cpu:8", 8, workload="prefill")
