"""Axes of collectives in a text, by brute force: random meshes, parts of axes, notations, member orders."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import example, given, settings
from hypothesis import strategies as st

from shardlab.analysis import analyze

MAX_DEVICES = 64
SIZES = st.lists(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16]), min_size=1, max_size=5).filter(
    lambda sizes: math.prod(sizes) <= MAX_DEVICES
)


@dataclass(frozen=True, slots=True)
class Factor:
    """One factor of an axis, [pre, size, rest] of it; `joined`: whether the collective runs over it."""

    axis: int
    pre: int
    size: int
    joined: bool


@st.composite
def programs(draw: st.DrawFn) -> tuple[list[int], list[Factor]]:
    """Axis sizes, and all axes as random factors, major to minor, some of them joined."""
    sizes = draw(SIZES)
    factors = []
    for axis, size in enumerate(sizes):
        pre = 1
        while pre < size:
            rest = size // pre
            part = draw(st.sampled_from([d for d in range(2, rest + 1) if rest % d == 0]))
            factors.append(Factor(axis, pre, part, draw(st.booleans())))
            pre *= part
    return sizes, factors


def runs(factors: Sequence[Factor]) -> list[tuple[int, int, int]]:
    """(axis, pre, size) of what is joined; joined neighbours in one axis are one part."""
    found: list[tuple[int, int, int]] = []
    for factor in factors:
        if not factor.joined:
            continue
        axis, pre, size = found[-1] if found else (-1, 1, 1)
        if axis == factor.axis and pre * size == factor.pre:
            found[-1] = (axis, pre, size * factor.size)
        else:
            found.append((factor.axis, factor.pre, factor.size))
    return found


def brute_force(sizes: Sequence[int], factors: Sequence[Factor]) -> list[list[int]]:
    """Positions are together when they agree in every digit that is not joined."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for position, at in enumerate(itertools.product(*map(range, sizes))):
        digits = tuple(
            at[f.axis] // (sizes[f.axis] // (f.pre * f.size)) % f.size for f in factors if not f.joined
        )
        groups.setdefault(digits, []).append(position)
    return list(groups.values())


def listed(sizes: Sequence[int], factors: Sequence[Factor], chosen: random.Random) -> str:
    """V1, members and groups in any order."""
    groups = brute_force(sizes, factors)
    for group in groups:
        chosen.shuffle(group)
    chosen.shuffle(groups)
    return "{" + ",".join("{" + ",".join(map(str, group)) + "}" for group in groups) + "}"


def iota(sizes: Sequence[int], factors: Sequence[Factor], chosen: random.Random) -> str:
    """V2: the joined factors are moved to the end, in any order."""
    apart = [i for i, factor in enumerate(factors) if not factor.joined]
    joined = [i for i, factor in enumerate(factors) if factor.joined]
    chosen.shuffle(apart)
    chosen.shuffle(joined)
    members = math.prod(factors[i].size for i in joined)
    dims = ",".join(str(factor.size) for factor in factors) or "1"
    order = f"T({','.join(map(str, apart + joined))})" if factors else ""
    return f"[{math.prod(sizes) // members},{members}]<=[{dims}]{order}"


def mesh_axes(sizes: Sequence[int], factors: Sequence[Factor], chosen: random.Random) -> str:
    """V3 over the same mesh under other names, its axes in any order."""
    printed = ",".join(f"'axis_{axis}'={size}" for axis, size in enumerate(sizes))
    refs = [
        f"'axis_{axis}'" if size == sizes[axis] else f"'axis_{axis}':({pre}){size}"
        for axis, pre, size in runs(factors)
    ]
    chosen.shuffle(refs)
    return f"mesh[{printed}] {{{','.join(refs)}}}"


def mesh_of_other_ids(sizes: Sequence[int], factors: Sequence[Factor], chosen: random.Random) -> str:
    """V3 over a mesh whose axes are the factors, shuffled, with explicit device ids."""
    shuffled = list(enumerate(factors))
    chosen.shuffle(shuffled)
    strides = [math.prod(f.size for f in factors[i + 1 :]) for i in range(len(factors))]
    ids = [
        sum(digit * strides[i] for digit, (i, _) in zip(digits, shuffled, strict=True))
        for digits in itertools.product(*(range(factor.size) for _, factor in shuffled))
    ]
    printed = ",".join(f"'f{i}'={factor.size}" for i, factor in shuffled)
    refs = ",".join(f"'f{i}'" for i, factor in shuffled if factor.joined)
    return f"mesh[{printed}], device_ids=({','.join(map(str, ids))}) {{{refs}}}"


NOTATIONS = (listed, iota, mesh_axes, mesh_of_other_ids)


# two parts of one axis, which do not touch
APART = ([2, 8], [Factor(0, 1, 2, False), *(Factor(1, pre, 2, pre != 2) for pre in (1, 2, 4))])


@given(programs(), st.randoms(use_true_random=False))
@example(APART, random.Random(0))
@settings(max_examples=100, deadline=None)
def test_axes_in_every_notation(drawn: tuple[list[int], list[Factor]], chosen: random.Random) -> None:
    sizes, factors = drawn
    lines = [
        f"  %c{number} = f32[64]{{0}} all-reduce(%p), channel_id=1, "
        f"replica_groups={notation(sizes, factors, chosen)}, use_global_device_ids=true, to_apply=%add\n"
        for number, notation in enumerate(NOTATIONS)
    ]
    text = (
        f"HloModule m, num_partitions={math.prod(sizes)}\n\n%add {{\n  %a = f32[] parameter(0)\n"
        "  %b = f32[] parameter(1)\n  ROOT %s = f32[] add(%a, %b)\n}\n\nENTRY %main {\n"
        f"  %p = f32[64]{{0}} parameter(0)\n{''.join(lines)}  ROOT %r = f32[64]{{0}} copy(%p)\n}}\n"
    )
    expected = tuple(
        f"x{axis}" if size == sizes[axis] else f"x{axis}:({pre}){size}" for axis, pre, size in runs(factors)
    )
    found = analyze(text, axes={f"x{axis}": size for axis, size in enumerate(sizes)})
    members = math.prod(factor.size for factor in factors if factor.joined)
    assert [(row.axes, row.group_size) for row in found.collectives] == [(expected, members)] * 4
