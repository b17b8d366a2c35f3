"""Random analyses whose totals are their rows', and what a compiler does to rows without a meaning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

from case_reports import analysis, collective
from hypothesis import strategies as st

from shardlab.analysis import Analysis, CollectiveRow, Totals

MESH = {"data": 2, "fsdp": 3, "tensor": 4}
KINDS = ("all-reduce", "all-gather", "reduce-scatter")
LAYERS = ("", "layers", "layers/mlp/gate", "layers/attention", "embedding")
TIERS = {("fsdp",): "infiniband", ("tensor",): "nvlink", ("fsdp", "tensor"): "infiniband"}


@st.composite
def rows(draw: st.DrawFn) -> CollectiveRow:
    axes = draw(st.sampled_from([*TIERS, None]))
    payload = draw(st.integers(1, 6)) * draw(st.sampled_from([1, 7, 64]))
    # a third of a byte: fsdp has three devices
    wire, tier = Fraction(2 * payload, 3), TIERS.get(axes or ())
    low = draw(st.integers(0, 3))
    runs = draw(st.sampled_from([(low, low), (low, low + 2), (low, None)]))
    return collective(
        draw(st.sampled_from(["a.1", "b.2", "c.3"])),
        kind=draw(st.sampled_from(KINDS)),
        axes=axes,
        tier=tier,
        executions=runs,
        dtypes=(draw(st.sampled_from(["f32", "bf16"])),),
        payload_bytes=payload,
        wire_bytes=wire,
        traffic={tier: wire} if tier else {},
        time_s=draw(st.sampled_from([None, 0.1, 0.25])),
        phase=draw(st.sampled_from(["forward", "backward"])),
        layer=draw(st.sampled_from(LAYERS)),
    )


def made_of(found: Sequence[CollectiveRow]) -> Analysis:
    """The analysis of rows without conditionals: its totals are their sums."""

    def total(each: Sequence[Fraction | int]) -> tuple[Fraction, Fraction | None]:
        low = sum((row.executions[0] * one for row, one in zip(found, each, strict=True)), Fraction(0))
        moving = [(row.executions[1], one) for row, one in zip(found, each, strict=True) if one]
        if any(high is None for high, _ in moving):
            return low, None
        return low, sum(((high or 0) * one for high, one in moving), Fraction(0))

    tiers = {tier for row in found for tier in row.traffic or {}}
    totals = Totals(
        payload_bytes=total([row.payload_bytes for row in found]),
        wire_bytes=total([row.wire_bytes for row in found]),
        traffic={tier: total([(row.traffic or {}).get(tier, 0) for row in found]) for tier in tiers},
    )
    return replace(analysis(), mesh=MESH, collectives=tuple(found), totals=totals)


@st.composite
def analyses(draw: st.DrawFn) -> Analysis:
    return made_of(draw(st.lists(rows(), max_size=8)))


@st.composite
def rewritten(draw: st.DrawFn, found: Analysis) -> Analysis:
    """The same step as another compiler might print it: renamed, renumbered, reordered, moved to other lines,
    runs of a loop split, arrays combined into one collective or split over two."""
    out: list[CollectiveRow] = []
    for number, row in enumerate(draw(st.permutations(found.collectives))):
        row = replace(row, name=f"{row.kind}.{100 + number}", source=f"other.py:{number}", op_name="x/y")
        out += _split(draw, row)
    return made_of(_combined(draw, out))


def _split(draw: st.DrawFn, row: CollectiveRow) -> list[CollectiveRow]:
    """Two collectives with half of the arrays each, or a loop of which some trips were peeled off."""
    low, high = row.executions
    how = draw(st.sampled_from(["whole", "arrays", "trips"]))
    if how == "arrays" and row.payload_bytes % 2 == 0:
        half = replace(
            row,
            payload_bytes=row.payload_bytes // 2,
            wire_bytes=row.wire_bytes / 2,
            traffic={tier: amount / 2 for tier, amount in (row.traffic or {}).items()},
        )
        return [half, replace(half, name=f"{row.name}.clone")]
    if how == "trips" and low and high is not None:
        return [
            replace(row, executions=(1, 1)),
            replace(row, name=f"{row.name}.peeled", executions=(low - 1, high - 1)),
        ]
    return [row]


def _combined(draw: st.DrawFn, found: list[CollectiveRow]) -> list[CollectiveRow]:
    """Neighbours of one kind and meaning that run equally often, as one tuple collective."""
    out: list[CollectiveRow] = []
    for row in found:
        last = out[-1] if out else None
        if last is not None and _alike(last, row) and draw(st.booleans()):
            together = {
                tier: amount + (row.traffic or {})[tier] for tier, amount in (last.traffic or {}).items()
            }
            out[-1] = replace(
                last,
                dtypes=(*last.dtypes, *row.dtypes),
                payload_bytes=last.payload_bytes + row.payload_bytes,
                wire_bytes=last.wire_bytes + row.wire_bytes,
                traffic=together,
                layer=last.layer if last.layer == row.layer else "",
            )
        else:
            out.append(row)
    return out


def _alike(one: CollectiveRow, other: CollectiveRow) -> bool:
    return (one.kind, one.axes, one.executions, one.phase) == (
        other.kind,
        other.axes,
        other.executions,
        other.phase,
    )
