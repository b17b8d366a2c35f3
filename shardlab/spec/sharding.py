"""Rules to shardings: which mesh axes each dimension of an array is split over. Pure values, no jax.

A rule table maps a logical axis (`embed`) to mesh axes, major to minor. `parallel/` turns what
`array_sharding` returns into a `PartitionSpec`; the feasibility check of a case uses the same function, so
the two cannot disagree.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from shardlab.errors import Infeasible, Problem, UserError

Sharding = tuple[tuple[str, ...], ...]

# Logical axes of the parameters that transformers have, one entry per kind of array. A plan is checked
# against them without a model; `params.parameter_table` gives the arrays of one model. Leading: stage, layers
# (scanned), expert.
PARAM_ARRAYS: Mapping[str, tuple[str, ...]] = {
    "token embedding": ("vocab", "embed"),
    "query projection": ("stage", "layers", "embed", "heads", "head_dim"),
    "key and value projections": ("stage", "layers", "embed", "kv_heads", "head_dim"),
    "latent up-projections": ("stage", "layers", "latent", "heads", "head_dim"),
    "output projection": ("stage", "layers", "heads", "head_dim", "embed"),
    "MLP projections": ("stage", "layers", "embed", "mlp"),
    "expert MLP projections": ("stage", "layers", "expert", "embed", "mlp"),
}

# Block families, named after the part of a layer that parameter paths name (`layers/moe/gate/kernel`), and
# which of PARAM_ARRAYS each has. `mlp` is the MLP of a dense model or of leading dense layers, `moe` the
# experts with their router, `shared` the shared experts.
BLOCK_ARRAYS: Mapping[str, tuple[str, ...]] = {
    "attention": (
        "query projection",
        "key and value projections",
        "latent up-projections",
        "output projection",
    ),
    "mlp": ("MLP projections",),
    "moe": ("expert MLP projections",),
    "shared": ("MLP projections",),
}


def block_of(path: str) -> str | None:
    """The block family of a parameter; None for what is in no block: tables, norms of layers, the head."""
    return next((part for part in path.split("/") if part in BLOCK_ARRAYS), None)


# Logical axes of the key activations; `norm_seq` is the sequence of the residual stream and the norms,
# `hop_seq` that of what passes between stages.
ACTIVATION_ARRAYS: Mapping[str, tuple[str | None, ...]] = {
    "tokens": ("batch", "seq"),
    "residual stream": ("batch", "norm_seq", "embed"),
    "what passes between stages": ("batch", "hop_seq", "embed"),
    "projection inputs": ("batch", "seq", "embed"),
    "queries": ("batch", "seq", "heads", None),
    "keys and values": ("batch", "kv_seq", "kv_heads", None),
    "MLP hidden": ("batch", "seq", "mlp"),
    "logits": ("batch", "seq", "vocab"),
}

# Only a decode workload has it.
CACHE_ARRAY: tuple[str | None, ...] = ("batch", "cache", "kv_heads", None)

_NOUNS = {
    "heads": "heads",
    "kv_heads": "KV heads",
    "batch": "sequences",
    "seq": "tokens",
    "layers": "layers",
    "expert": "experts",
}


def array_sharding(
    shape: Sequence[int],
    axes: Sequence[str | None],
    rules: Mapping[str, Sequence[str]],
    mesh: Mapping[str, int],
    *,
    what: str = "",
) -> Sharding:
    """For each dimension of an array the mesh axes it is split over, major to minor; () is replicated.

    shape: the global extents; axes: the logical axis of each dimension, None for none; rules: logical axis ->
    mesh axes, absent is replicated; mesh: mesh axis -> size; what: the array's name for messages.
    KV heads that the axes do not divide are replicated (`replicated_kv_heads` tells).
    Raises UserError when one mesh axis would split two dimensions, or a rule names no mesh axis; Infeasible
    when a dimension does not divide.
    """
    if len(shape) != len(axes):
        raise ValueError(f"{what or 'array'}: {len(shape)} dimensions but {len(axes)} logical axes")
    clashes = [clash.problem(what or "rules", what) for clash in double_use(axes, rules)]
    problems = clashes + _unknown_axes(axes, rules, mesh, what)
    if problems:
        raise UserError(*problems)
    return tuple(_dimension(size, axis, rules, mesh, what) for size, axis in zip(shape, axes, strict=True))


def _dimension(
    size: int, axis: str | None, rules: Mapping[str, Sequence[str]], mesh: Mapping[str, int], what: str
) -> tuple[str, ...]:
    split = tuple(rules.get(axis, ())) if axis is not None else ()
    ways = num_ways(split, mesh)
    if size % ways == 0:
        return split
    if axis == "kv_heads":
        return ()
    raise Infeasible(_reason(size, axis or "", split, ways, what), _nearest(size, axis or "", ways))


def _reason(size: int, axis: str, split: Sequence[str], ways: int, what: str) -> str:
    """`6 heads over 4 devices (tensor)`, `embed of 100 over 8 devices (fsdp)`; `where` says the array."""
    count = f"{size} {_NOUNS[axis]}" if axis in _NOUNS else f"{axis} of {size}"
    where = f" in {what}" if what else ""
    return f"{count} over {ways} devices ({' x '.join(split)}){where}"


def _nearest(size: int, axis: str, ways: int) -> str:
    """What would work: the nearest axis size, or for what the user chooses, the nearest number."""
    if axis in ("batch", "seq", "norm_seq", "hop_seq", "kv_seq", "cache"):
        below, above = size // ways * ways, -(-size // ways) * ways
        noun = "batch" if axis == "batch" else "seq"
        return f"nearest {noun} that divides: {f'{below} or {above}' if below else above}"
    return f"nearest size that divides: {nearest_divisor(size, ways)}"


def nearest_divisor(size: int, ways: int) -> int:
    """The divisor of `size` nearest to `ways`; the smaller of two that are equally near."""
    return min(
        (d for d in range(1, min(size, 2 * ways) + 1) if size % d == 0), key=lambda d: (abs(d - ways), d)
    )


def num_ways(split: Iterable[str], mesh: Mapping[str, int]) -> int:
    """Into how many parts these mesh axes split a dimension."""
    return math.prod(mesh[name] for name in split)


class Clash(NamedTuple):
    """One mesh axis that would split two dimensions, `first` and `second` (equal for a doubled name)."""

    mesh_axis: str
    first: str
    second: str

    def problem(self, where: str, what: str) -> Problem:
        """The mistake, for messages; what: the array."""
        array = f"of the {what}" if what else "of one array"
        wrong = f"mesh axis {self.mesh_axis!r} would split both {self.first!r} and {self.second!r} {array}"
        return Problem(where, wrong, f"take {self.mesh_axis!r} out of one of the two rules")


def double_use(axes: Sequence[str | None], rules: Mapping[str, Sequence[str]]) -> list[Clash]:
    """The mesh axes that would split two dimensions of an array with these logical axes."""
    first: dict[str, str] = {}
    clashes = []
    for axis in axes:
        for name in rules.get(axis, ()) if axis is not None else ():
            if name in first:
                clashes.append(Clash(name, first[name], str(axis)))
            first.setdefault(name, str(axis))
    return clashes


def _unknown_axes(
    axes: Sequence[str | None], rules: Mapping[str, Sequence[str]], mesh: Mapping[str, int], what: str
) -> list[Problem]:
    return [
        Problem(what or "rules", f"{axis!r} names no mesh axis {name!r}", f"mesh axes: {', '.join(mesh)}")
        for axis in axes
        if axis is not None
        for name in rules.get(axis, ())
        if name not in mesh
    ]


def replicated_kv_heads(
    kv_heads: int, rules: Mapping[str, Sequence[str]], mesh: Mapping[str, int]
) -> str | None:
    """The sentence for reports when KV heads are replicated since the axes do not divide them, else None."""
    split = tuple(rules.get("kv_heads", ()))
    ways = num_ways(split, mesh)
    if kv_heads % ways == 0:
        return None
    return f"{kv_heads} KV heads over {ways} devices ({' x '.join(split)}): the KV heads are replicated"


def split_groups(
    heads: int, kv_heads: int, rules: Mapping[str, Sequence[str]], mesh: Mapping[str, int]
) -> str | None:
    """The sentence for reports when a device's query heads need parts of several KV groups unevenly, else
    None.

    Query heads group properly over t devices when t divides the KV heads, or the KV heads divide t.
    """
    ways = num_ways(rules.get("heads", ()), mesh)
    if kv_heads % ways == 0 or ways % kv_heads == 0:
        return None
    return f"{heads} query heads on {kv_heads} KV heads over {ways} devices: KV groups straddle devices"
