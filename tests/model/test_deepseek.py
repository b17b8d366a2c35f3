"""Our DeepSeek against Hugging Face's DeepseekV3ForCausalLM: logits, loss and every gradient, and decoding.

The golden file comes from tests/golden/hf/make_golden.py. Published weights have rotary dimensions in pairs
(2i, 2i + 1), ours (i, i + D/2): another order of the same columns. Hugging Face's model has no balance loss.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shardlab.model.cache import Latent, Slots
from shardlab.model.experts import Load, load_of, route, sequence_balance_loss
from shardlab.model.loss import cross_entropy
from shardlab.model.runtime import Runtime
from shardlab.model.transformer import abstract_model, with_params
from shardlab.spec.models import LatentAttention, ModelConfig, Router
from shardlab.spec.params import parameter_table

GOLDEN = Path(__file__).parent.parent / "golden" / "hf" / "deepseek.npz"
TOLERANCE = 1e-5  # as in test_hugging_face.py

DEEPSEEK = ModelConfig(
    name="deepseek",
    layers=3,
    embed=16,
    heads=4,
    kv_heads=4,
    head_dim=12,
    mlp=12,
    vocab=50,
    context=32,
    norm_epsilon=1e-6,
    num_experts=8,
    experts_per_token=3,
    shared_experts=2,
    dense_layers=1,
    dense_mlp=40,
    scoring="sigmoid",
    routed_scaling=2.5,
    expert_groups=4,
    groups_per_token=2,
    router_bias=True,
    latent=LatentAttention(query_rank=20, kv_rank=12, nope_dim=8, rope_dim=4, value_dim=6),
)
RUN = Runtime(compute_dtype=jnp.float32)

NAMES = {
    "embedding/table": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
    "attention_norm/scale": "input_layernorm.weight",
    "attention/query_down/kernel": "self_attn.q_a_proj.weight",
    "attention/query_norm/scale": "self_attn.q_a_layernorm.weight",
    "attention/query_up/kernel": "self_attn.q_b_proj.weight",
    "attention/kv_down/kernel": "self_attn.kv_a_proj_with_mqa.weight",
    "attention/kv_norm/scale": "self_attn.kv_a_layernorm.weight",
    "attention/kv_up/kernel": "self_attn.kv_b_proj.weight",
    "attention/output/kernel": "self_attn.o_proj.weight",
    "mlp_norm/scale": "post_attention_layernorm.weight",
    **{f"mlp/{part}/kernel": f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")},
    **{f"shared/{part}/kernel": f"mlp.shared_experts.{part}_proj.weight" for part in ("gate", "up", "down")},
    "moe/router/kernel": "mlp.gate.weight",
    "moe/router/bias": "mlp.gate.e_score_correction_bias",
    "moe/gate/kernel": "mlp.experts.gate_up_proj",  # [expert, out, in], gate and up in one array
    "moe/up/kernel": "mlp.experts.gate_up_proj",
    "moe/down/kernel": "mlp.experts.down_proj",
}


@cache
def golden() -> Mapping[str, np.ndarray]:
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


def ours(kind: str, *, pairs: bool = True) -> dict[str, jax.Array]:
    """Hugging Face's arrays (`weight` or `gradient`) by our paths and in our shapes (unrolled layers); pairs:
    rotary columns put in our order."""
    found = {}
    for spec in parameter_table(DEEPSEEK, scan_layers=False):
        stack, _, rest = spec.path.partition("/")
        name = spec.path if stack not in ("layers", "dense_layers") else rest.partition("/")[2]
        prefix = ""
        if name != spec.path:
            index = int(rest.partition("/")[0]) + (DEEPSEEK.dense_layers if stack == "layers" else 0)
            prefix = f"model.layers.{index}."
        array = golden().get(f"{kind}:{prefix}{NAMES[name]}")
        if array is not None:
            found[spec.path] = jnp.asarray(_shaped(array, name, spec.shape, pairs))
    return found


def _shaped(array: np.ndarray, name: str, shape: tuple[int, ...], pairs: bool) -> np.ndarray:
    if name in ("moe/gate/kernel", "moe/up/kernel"):
        return np.split(array.swapaxes(1, 2), 2, axis=-1)[name == "moe/up/kernel"]
    if name == "moe/down/kernel":
        return array.swapaxes(1, 2)
    if name in ("embedding/table", "head/kernel"):
        array = array.T if name == "head/kernel" else array
        return np.pad(array, [(0, size - had) for size, had in zip(shape, array.shape, strict=True)])
    array = array.T.reshape(shape)
    if name not in ("attention/query_up/kernel", "attention/kv_down/kernel") or not pairs:
        return array
    plain, turned = np.split(array, [-4], axis=-1)  # the last rope_dim columns
    return np.concatenate([plain, turned[..., ::2], turned[..., 1::2]], axis=-1)


def difference(found: jax.Array, expected: np.ndarray | jax.Array) -> float:
    """max |found - expected| / max |expected|."""
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())


def logits(params: dict[str, jax.Array], config: ModelConfig = DEEPSEEK) -> jax.Array:
    model = abstract_model(config, scan_layers=False)
    return with_params(model, params)(jnp.asarray(golden()["tokens"]), RUN)[..., : config.vocab]


def test_matches_hugging_face() -> None:
    def loss_and_logits(params: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        found = logits(params)
        return cross_entropy(found, jnp.asarray(golden()["targets"])), found

    params = ours("weight")
    (loss, found), gradients = jax.jit(jax.value_and_grad(loss_and_logits, has_aux=True))(params)
    assert difference(loss, golden()["loss"]) < TOLERANCE
    assert difference(found, golden()["logits"]) < TOLERANCE
    expected = ours("gradient")
    assert gradients.keys() - expected.keys() == {f"layers/{i}/moe/router/bias" for i in range(2)}
    wrong = [path for path, array in expected.items() if difference(gradients[path], array) >= TOLERANCE]
    assert not wrong


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"routed_scaling": 1.0}, id="scaling"),
        pytest.param({"scoring": "softmax"}, id="scoring"),
        pytest.param({"expert_groups": 1}, id="groups"),
        pytest.param({"pairs": False}, id="rope-convention"),
        pytest.param({"bias": False}, id="bias"),
    ],
)
def test_a_mistake_does_not_match(changes: dict[str, object]) -> None:
    changes = dict(changes)
    params = ours("weight", pairs=bool(changes.pop("pairs", True)))
    if not changes.pop("bias", True):
        params = {path: a * (not path.endswith("bias")) for path, a in params.items()}
    config = replace(DEEPSEEK, **changes)  # type: ignore[arg-type]
    found = jax.jit(lambda params: logits(params, config))(params)
    assert difference(found, golden()["logits"]) > 100 * TOLERANCE


def test_decoding_from_latents_matches_hugging_face() -> None:
    """Prefill of all tokens but the last, then that one: attention in the latent space gives the same."""
    model = with_params(abstract_model(DEEPSEEK, scan_layers=False), ours("weight"))
    tokens = jnp.asarray(golden()["tokens"])

    def last(tokens: jax.Array) -> jax.Array:
        _, cached = model.prefill(tokens[:, :-1], RUN)
        assert isinstance(cached, dict)
        rooms = {
            name: Latent(jnp.pad(c.latent, ((0, 0),) * 2 + ((0, 1), (0, 0)))) for name, c in cached.items()
        }
        assert [room.latent.shape for room in rooms.values()] == [(1, 2, 12, 12 + 4), (2, 2, 12, 12 + 4)]
        ones = jnp.ones(len(tokens), jnp.int32)
        return model.decode(Slots(tokens[:, -1:], 11 * ones, ones), rooms, RUN)[0]

    found = jax.jit(last)(tokens)[:, : DEEPSEEK.vocab]
    assert difference(found, golden()["logits"][:, -1]) < TOLERANCE


EIGHT = Router(experts_per_token=2, scoring="sigmoid", groups=4, groups_per_token=2, bias=True)


def test_only_experts_of_the_best_groups_are_chosen() -> None:
    """Groups (0, 1), (2, 3), …: the best expert, 6, is alone in its group; (0, 1) and (2, 3) sum to more."""
    scores = jnp.array([0.6, 0.5, 0.55, 0.52, 0.1, 0.1, 0.9, 0.1])
    routing = route(jnp.log(scores / (1 - scores))[None, None], EIGHT, jnp.zeros(8))
    assert routing.experts.tolist() == [[[0, 2]]]
    np.testing.assert_allclose(routing.weights[0, 0], np.array([0.6, 0.55]) / 1.15, rtol=1e-6)
    assert routing.likeliest.tolist() == [[[6, 0]]]
    bias = jnp.zeros(8).at[7].set(0.5)  # 0.9 + 0.6 is the best group now; weights are without the bias
    routing = route(jnp.log(scores / (1 - scores))[None, None], EIGHT, bias)
    assert routing.experts.tolist() == [[[6, 0]]]
    np.testing.assert_allclose(routing.weights[0, 0], np.array([0.9, 0.6]) / 1.5, rtol=1e-6)


def test_the_loss_of_a_sequence_is_one_where_load_is_even() -> None:
    """arXiv:2412.19437, equation 17: of two sequences that each have one expert alone, X / K; summed over
    layers."""
    even = Load(*(jnp.full((3, 2, 1, 8), value) for value in (2 / 8, 1 / 8, 2 / 8)))
    assert float(sequence_balance_loss(even, 2)) == pytest.approx(3)
    one = jnp.stack([jnp.eye(8)[0], jnp.eye(8)[5]])[None, :, None]
    assert float(sequence_balance_loss(Load(one, one, one), 1)) == pytest.approx(8)


def test_load_knows_both_choices() -> None:
    scores = jnp.array([[0.6, 0.5, 0.55, 0.52, 0.1, 0.1, 0.9, 0.1]])
    load = load_of(route(jnp.log(scores / (1 - scores))[None], EIGHT, jnp.zeros(8)), each=True)
    assert load.chosen[0, 0].tolist() == [1, 0, 1, 0, 0, 0, 0, 0]
    assert load.assigned[0, 0].tolist() == [1, 0, 0, 0, 0, 0, 1, 0]
