"""Forward and backward at different times: what a differentiation keeps between them, as arrays.

`jax.vjp` returns a pytree whose leaves are its residuals. Those that depend on the input are kept; the others
(parameters, what is cast or gathered of them, positions, masks) are the same for every microbatch, and are
found again by tracing the forward once more on zeros, of which the compiler leaves what is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

Input = TypeVar("Input")
Residuals = tuple[jax.Array, ...]
# input -> (output, whatever the backward needs, a pytree of arrays: what `jax.vjp` gives).
Differentiation = Callable[[Input], tuple[Any, Any]]


def forward(differentiate: Differentiation[Input], x: Input) -> tuple[Any, Residuals]:
    """The output for x, and what to keep until the backward."""
    out, held = differentiate(x)
    leaves, places = jax.tree.leaves(held), _places(differentiate, x)
    return out, tuple(leaves[places.index(place)] for place in range(_count(places)))


def restored(differentiate: Differentiation[Input], like: Input, residuals: Residuals) -> Any:
    """What `differentiate` gave the backward, given what `forward` kept of it. like: shapes of the input."""
    zeros = jax.tree.map(jnp.zeros_like, like)
    leaves, tree = jax.tree.flatten(differentiate(zeros)[1])
    places = _places(differentiate, zeros)
    kept = [leaf if place is None else residuals[place] for leaf, place in zip(leaves, places, strict=True)]
    return jax.tree.unflatten(tree, kept)


def _places(differentiate: Differentiation[Input], x: Input) -> list[int | None]:
    """Of each leaf, which of the distinct residuals it is; None where it does not depend on the input.

    An equation with any operand that depends on the input is taken to depend on it in all of its results.
    """
    jaxpr = jax.make_jaxpr(lambda x: jax.tree.leaves(differentiate(x)[1]))(x).jaxpr
    depends = set(jaxpr.invars)
    for equation in jaxpr.eqns:
        if any(isinstance(v, jax.extend.core.Var) and v in depends for v in equation.invars):
            depends.update(equation.outvars)
    distinct: dict[Any, int] = {}
    return [
        distinct.setdefault(v, len(distinct)) if isinstance(v, jax.extend.core.Var) and v in depends else None
        for v in jaxpr.outvars
    ]


def _count(places: list[int | None]) -> int:
    return len({place for place in places if place is not None})
