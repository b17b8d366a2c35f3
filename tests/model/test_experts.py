"""The router, the two ways to dispatch, and the load-balance loss, against one expert at a time."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shardlab.model.experts import (
    Exchange,
    Kernels,
    Load,
    balance_loss,
    dropless,
    load_of,
    route,
    with_capacity,
)
from shardlab.spec.models import Router

TOKENS, EXPERTS, CHOSEN, EMBED, MLP = 12, 4, 2, 8, 16
KEYS = jax.random.split(jax.random.key(0), 5)
ROUTER = Router(experts_per_token=CHOSEN)
X_TxE = jax.random.normal(KEYS[0], (TOKENS, EMBED))
LOGITS_TxX = jax.random.normal(KEYS[1], (TOKENS, EXPERTS))
KERNELS = Kernels(
    jax.random.normal(KEYS[2], (EXPERTS, EMBED, MLP)),
    jax.random.normal(KEYS[3], (EXPERTS, EMBED, MLP)),
    jax.random.normal(KEYS[4], (EXPERTS, MLP, EMBED)),
)


def one_by_one(capacity: int) -> np.ndarray:
    """Every token through its experts in turn, in numpy; queues fill by rank of choice, then by token."""
    logits = np.asarray(LOGITS_TxX, np.float64)
    order = np.argsort(-logits, axis=1)[:, :CHOSEN]
    taken = dict.fromkeys(range(EXPERTS), 0)
    out = np.zeros((TOKENS, EMBED))
    for rank in range(CHOSEN):
        for token in range(TOKENS):
            expert = order[token, rank]
            taken[expert] += 1
            if taken[expert] > capacity:
                continue
            chosen = np.exp(logits[token, order[token]])
            gate, up, down = (np.asarray(k[expert], np.float64) for k in KERNELS)
            x = np.asarray(X_TxE[token], np.float64)
            hidden = x @ gate / (1 + np.exp(-(x @ gate))) * (x @ up)
            out[token] += chosen[rank] / chosen.sum() * (hidden @ down)
    return out


def test_dropless_drops_nothing() -> None:
    out = dropless(X_TxE, route(LOGITS_TxX, ROUTER), KERNELS, Exchange())
    np.testing.assert_allclose(out, one_by_one(TOKENS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("factor", "capacity"),
    [("0.5", 3), ("0.6", 4), ("1", 6), ("100", TOKENS)],  # ceil(factor · 12 · 2 / 4)
)
def test_an_expert_takes_its_capacity(factor: str, capacity: int) -> None:
    out = with_capacity(Fraction(factor))(X_TxE, route(LOGITS_TxX, ROUTER), KERNELS, Exchange())
    np.testing.assert_allclose(out, one_by_one(capacity), rtol=1e-4, atol=1e-4)


def test_the_tight_capacities_drop_something() -> None:
    """Else the test above could not tell the order of the queues."""
    assert np.abs(one_by_one(4) - one_by_one(TOKENS)).max() > 0.1


@pytest.mark.parametrize(
    ("assigned", "probability", "loss"),
    [
        pytest.param([0.5] * 4, [0.25] * 4, 2.0, id="even"),  # 4 · 4 · 0.5 · 0.25: experts per token
        pytest.param([1.0, 1.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0], 4.0, id="half-of-the-experts"),
    ],
)
def test_balance_loss(assigned: list[float], probability: list[float], loss: float) -> None:
    f, p = (jnp.array([numbers, numbers]) for numbers in (assigned, probability))
    load = Load(f, p, f)
    assert float(balance_loss(load)) == pytest.approx(loss)


def test_load_counts_every_choice() -> None:
    load = load_of(route(LOGITS_TxX[None], ROUTER))
    first_two = np.argsort(-np.asarray(LOGITS_TxX), axis=1)[:, :CHOSEN]
    np.testing.assert_allclose(load.assigned[0, 0], np.bincount(first_two.reshape(-1)) / TOKENS, rtol=1e-6)
    np.testing.assert_allclose(load.probability[0, 0], jax.nn.softmax(LOGITS_TxX).mean(0), rtol=1e-6)
