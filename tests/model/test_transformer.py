"""The transformer on one device, in f32: parameters, causality, remat, scan, padding, prefill and decode."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilers import otherwise_in_jax_0_10

from shardlab.model.cache import Slots
from shardlab.model.loss import Loss, cross_entropy, in_parts, unfused_cross_entropy
from shardlab.model.runtime import Runtime
from shardlab.model.transformer import Params, abstract_model, as_used, to_params, with_params
from shardlab.spec.models import ModelConfig
from shardlab.spec.params import parameter_table

LLAMA = ModelConfig(
    name="small-llama",
    layers=3,
    embed=16,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp=32,
    vocab=100,
    context=16,
)
GPT2 = replace(
    LLAMA,
    name="small-gpt2",
    kv_heads=4,
    norm="layernorm",
    activation="gelu",
    positions="learned",
    tied_embeddings=True,
    bias=True,
)
EXPERTS = replace(LLAMA, name="small-experts", num_experts=4, experts_per_token=2)
BOTH = pytest.mark.parametrize("config", [LLAMA, GPT2], ids=lambda config: config.name)
F32 = Runtime(compute_dtype=jnp.float32)


def random_tokens(config: ModelConfig, length: int = 12) -> jax.Array:
    return jax.random.randint(jax.random.key(7), (2, length), 0, config.vocab)


def random_params(config: ModelConfig) -> Params:
    """Random parameters, biases and scales too."""
    random = np.random.default_rng(0)
    return {
        p.path: jnp.asarray(
            random.normal(1.0 if p.path.endswith("scale") else 0.0, 0.2, p.shape), dtype=jnp.float32
        )
        for p in parameter_table(config)
    }


def unrolled(params: Params, config: ModelConfig) -> Params:
    """The same parameters, one array per layer."""
    flat: Params = {}
    for path, array in params.items():
        if path.startswith("layers/"):
            flat |= {path.replace("layers/", f"layers/{i}/", 1): array[i] for i in range(config.layers)}
        else:
            flat[path] = array
    return flat


def loss_of(params: Params, config: ModelConfig, run: Runtime, *, scan_layers: bool = True) -> jax.Array:
    model = with_params(abstract_model(config, scan_layers=scan_layers), params)
    tokens = random_tokens(config, 13)
    return cross_entropy(model(tokens[:, :-1], run), tokens[:, 1:])


@partial(jax.jit, static_argnums=2)
def logits_of(params: Params, tokens: jax.Array, config: ModelConfig) -> jax.Array:
    return with_params(abstract_model(config), params)(tokens, F32)


@partial(jax.jit, static_argnums=(1, 2), static_argnames="scan_layers")
def gradients(params: Params, config: ModelConfig, run: Runtime, *, scan_layers: bool = True) -> Params:
    return jax.grad(loss_of)(params, config, run, scan_layers=scan_layers)


def assert_same(ours: Params, truth: Params, rtol: float) -> None:
    assert ours.keys() == truth.keys()
    for path in truth:
        scale = float(jnp.max(jnp.abs(truth[path])))
        np.testing.assert_allclose(ours[path], truth[path], rtol=rtol, atol=rtol * scale + 1e-8, err_msg=path)


@BOTH
@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])
def test_parameters_are_those_of_the_table(config: ModelConfig, scan_layers: bool) -> None:
    """Paths, shapes, types, and the logical axes that the model itself carries."""
    model = abstract_model(config, scan_layers=scan_layers)
    table = parameter_table(config, scan_layers=scan_layers)
    assert {p.path: (p.shape, jnp.float32) for p in table} == {
        path: (leaf.shape, leaf.dtype) for path, leaf in to_params(model).items()
    }
    from flax import nnx

    axes = {"/".join(map(str, path)): v.logical_axes for path, v in nnx.to_flat_state(nnx.state(model))}
    assert axes == {p.path: p.axes[1:] if p.axes[0] == "layers" else p.axes for p in table}


@pytest.mark.parametrize(
    ("config", "count"),
    [
        # Llama 3 8B has 8,030,261,248 parameters; GPT-2 124M 124,439,808, here with 47 rows of padding.
        pytest.param(
            ModelConfig(
                name="llama3-8b",
                layers=32,
                embed=4096,
                heads=32,
                kv_heads=8,
                head_dim=128,
                mlp=14336,
                vocab=128256,
                context=8192,
            ),
            8_030_261_248,
            id="llama3-8b",
        ),
        pytest.param(
            replace(
                GPT2,
                layers=12,
                embed=768,
                heads=12,
                kv_heads=12,
                head_dim=64,
                mlp=3072,
                vocab=50257,
                context=1024,
            ),
            124_439_808 + 47 * 768,
            id="gpt2-124m",
        ),
    ],
)
def test_number_of_parameters_is_the_published_one(config: ModelConfig, count: int) -> None:
    assert sum(leaf.size for leaf in to_params(abstract_model(config)).values()) == count


@BOTH
def test_a_position_sees_no_later_token(config: ModelConfig) -> None:
    params, tokens = random_params(config), random_tokens(config)
    changed = tokens.at[:, 8].set((tokens[:, 8] + 1) % config.vocab)
    before, after = logits_of(params, tokens, config), logits_of(params, changed, config)
    np.testing.assert_array_equal(before[:, :8], after[:, :8])
    assert (
        float(jnp.max(jnp.abs(before[:, 8:] - after[:, 8:]), initial=0, where=before[:, 8:] > -1e29)) > 1e-3
    )


@BOTH
def test_padded_vocabulary_gets_no_probability(config: ModelConfig) -> None:
    logits = logits_of(random_params(config), random_tokens(config), config)
    probability = jax.nn.softmax(logits, axis=-1)
    assert logits.shape[-1] == 128
    np.testing.assert_array_equal(probability[..., config.vocab :], 0.0)
    np.testing.assert_allclose(probability[..., : config.vocab].sum(-1), 1.0, rtol=1e-5)
    assert float(probability[..., : config.vocab].min()) > 0


@pytest.mark.parametrize("remat", ["none", "selective", "matmuls", "offload"])
def test_remat_does_not_change_gradients(remat: Any) -> None:
    params = random_params(LLAMA)
    assert_same(gradients(params, LLAMA, replace(F32, remat=remat)), gradients(params, LLAMA, F32), 1e-5)


def products_in_backward(remat: Any) -> int:
    """Matrix products in the gradient's jaxpr, all nested ones included."""
    params = random_params(LLAMA)
    run = replace(F32, remat=remat)
    return str(jax.make_jaxpr(jax.grad(lambda p: loss_of(p, LLAMA, run)))(params)).count("dot_general")


def test_remat_policies_save_what_they_say() -> None:
    """full computes everything again, matmuls only attention's products (they have batch dimensions), none
    nothing."""
    none, matmuls, full = (products_in_backward(remat) for remat in ("none", "matmuls", "full"))
    assert none < matmuls < full


@BOTH
def test_scanned_layers_equal_unrolled_ones(config: ModelConfig) -> None:
    params = random_params(config)
    scanned = unrolled(gradients(params, config, F32), config)
    assert_same(gradients(unrolled(params, config), config, F32, scan_layers=False), scanned, 1e-5)
    keeping = replace(F32, remat="none")
    assert_same(gradients(unrolled(params, config), config, keeping, scan_layers=False), scanned, 1e-5)


def most_operands_of_a_fusion(layers: int) -> int:
    """In the unrolled gradient that keeps everything, as the CPU's compiler leaves it."""
    config = replace(GPT2, layers=layers)
    run = replace(F32, remat="none")
    shapes = {spec.path: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for spec in parameter_table(config)}
    stacked = jax.eval_shape(lambda params: unrolled(params, config), shapes)
    gradient = jax.jit(jax.grad(lambda params: loss_of(params, config, run, scan_layers=False)))
    compiled = gradient.lower(stacked).compile()
    fusions = [line for line in compiled.as_text().splitlines() if " fusion(" in line]
    return max(line.split(" fusion(")[1].split(")")[0].count("%") for line in fusions)


@pytest.mark.matrix
@otherwise_in_jax_0_10("removes the barriers before it fuses")
def test_unrolled_layers_do_not_add_up_the_gradients_of_all_later_ones() -> None:
    """What enters a layer is an array in memory, so no fusion grows with the number of layers."""
    assert most_operands_of_a_fusion(6) == most_operands_of_a_fusion(3)


@BOTH
@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])
def test_prefill_then_decode_equals_the_whole_sequence(config: ModelConfig, scan_layers: bool) -> None:
    params, tokens = random_params(config), random_tokens(config)
    params = params if scan_layers else unrolled(params, config)
    model = with_params(abstract_model(config, scan_layers=scan_layers), params)
    truth = logits_of(random_params(config), tokens, config)
    last, cache = jax.jit(model.prefill, static_argnums=1)(tokens[:, :9], F32)
    np.testing.assert_allclose(last, truth[:, 8], rtol=1e-4, atol=1e-5)
    cache = jax.tree.map(lambda a: jnp.pad(a, [(0, 0), (0, 0), (0, 3), (0, 0), (0, 0)]), cache)
    decode, ones = jax.jit(model.decode, static_argnums=2), jnp.ones(len(tokens), jnp.int32)
    for position in range(9, 12):
        slots = Slots(tokens[:, position : position + 1], ones * position, ones)
        logits, cache = decode(slots, cache, F32)
        np.testing.assert_allclose(logits, truth[:, position], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("function", [cross_entropy, unfused_cross_entropy])
def test_cross_entropy_of_known_logits(function: Loss, z_loss: float) -> None:
    """Two tokens with probabilities 1/4 and 3/4: logits log 1 and log 3, log Σ exp = log 4. The gradient is
    (p (1 + 2 z log 4) - 1 at the target), over two tokens."""
    logits = jnp.log(jnp.array([[[1.0, 3.0], [1.0, 3.0]]]))
    expected = (np.log(4) + np.log(4 / 3)) / 2 + z_loss * np.log(4) ** 2
    loss, gradient = jax.value_and_grad(function)(logits, jnp.array([[0, 1]]), z_loss=z_loss)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    p = np.array([1 / 4, 3 / 4]) * (1 + 2 * z_loss * np.log(4))
    np.testing.assert_allclose(gradient, [[p - [1, 0], p - [0, 1]]] / np.array(2.0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("config", [LLAMA, GPT2, EXPERTS], ids=lambda config: config.name)
def test_parameters_cast_beforehand_give_the_same_bits(config: ModelConfig) -> None:
    """In 16 bits: norms and routers are used in f32, and casting them would show."""
    params, run = random_params(config), Runtime(compute_dtype=jnp.bfloat16)
    model, tokens = abstract_model(config), random_tokens(config)
    cast = as_used(model, params, run)
    in_f32 = {path for path, array in cast.items() if array.dtype == jnp.float32}
    assert in_f32 == {path for path in params if "norm/" in path or "router/" in path}
    logits, again = (with_params(model, held)(tokens, run) for held in (params, cast))
    np.testing.assert_array_equal(logits, again)


def test_a_loss_in_parts_is_the_loss() -> None:
    """And so are its gradients; every weight and token counts once."""
    keys = jax.random.split(jax.random.key(0), 3)
    head_VxE, x_BxLxE = jax.random.normal(keys[0], (50, 8)), jax.random.normal(keys[1], (2, 12, 8))
    targets_BxL = jax.random.randint(keys[2], (2, 12), 0, 50)

    def loss_of(head_VxE: jax.Array, x_BxLxE: jax.Array, targets_BxL: jax.Array) -> jax.Array:
        return cross_entropy(jnp.einsum("ble,ve->blv", x_BxLxE, head_VxE), targets_BxL, z_loss=0.1)

    whole, parts = (
        jax.value_and_grad(loss, argnums=(0, 1))(head_VxE, x_BxLxE, targets_BxL)
        for loss in (loss_of, partial(in_parts, loss_of, 3))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), whole, parts)
