"""Which flows of the base are which of the head: the strictest reading first, each flow in one row.

1. The same kind, axes, dtypes, phase and layer with the same bytes: nothing happened.
2. The same bytes in sum under one outer scope, or over all layers: regrouped. A compiler that combines,
   splits or renames changes no more than this; neither does a refactoring that moves code between scopes.
3. The same meaning with other bytes: it grew, shrank, or uses other links.
4. The same payload over other axes, in another phase, by another kind, or in another dtype: it moved.
5. What is left was removed or added.

Every step treats both sides alike, so that the diff from head to base is the mirror image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction

from shardlab.analysis import ByteRange
from shardlab.review.records import Amounts, Flow, Row, What, minus, total

Key = Callable[[Flow], tuple[object, ...]]
ALIKE: tuple[Key, ...] = (
    lambda flow: flow.key,
    lambda flow: (*flow.key[:4], flow.layer.split("/")[0]),
    lambda flow: flow.key[:4],
    lambda flow: (flow.key[0], flow.key[1], flow.key[3]),  # a combined collective has several dtypes
)
# What may differ when a payload moves, with what then still is the same.
MOVES: tuple[tuple[str, Key], ...] = (
    ("axes", lambda flow: (flow.kind, flow.dtypes, flow.phase, flow.layer, flow.amounts.payload_bytes)),
    ("phase", lambda flow: (*flow.key[:3], flow.layer, flow.amounts.payload_bytes)),
    ("kind", lambda flow: (*flow.key[1:], flow.amounts.payload_bytes)),
    ("dtypes", lambda flow: (*flow.key[:2], *flow.key[3:])),
)


def match(base: Sequence[Flow], head: Sequence[Flow]) -> tuple[Row, ...]:
    """Rows in which every flow stands once, the largest change in wire bytes first."""
    left, right, rows = list(base), list(head), []
    for position, key in enumerate(ALIKE):
        for before, after in _together(left, right, key):
            if _equal(before, after):
                rows.append(Row(what="regrouped" if position else "same", base=before, head=after))
        left, right = _without(left, rows), _without(right, rows)
    for before, after in _together(left, right, ALIKE[0]):
        rows.append(_changed(before, after))
    for name, key in MOVES:
        left, right = _without(left, rows), _without(right, rows)
        for some, others in _together(left, right, key):
            rows += (_moved(name, *pair) for pair in zip(some, others, strict=False))
    rows += (Row(what="removed", base=(flow,)) for flow in _without(left, rows))
    rows += (Row(what="added", head=(flow,)) for flow in _without(right, rows))
    return tuple(sorted(rows, key=_largest_first))


def _together(
    base: Iterable[Flow], head: Iterable[Flow], key: Key
) -> list[tuple[tuple[Flow, ...], tuple[Flow, ...]]]:
    """Flows of both sides that share a key, where both have some."""
    found: dict[tuple[object, ...], tuple[list[Flow], list[Flow]]] = {}
    for side, flows in enumerate((base, head)):
        for flow in flows:
            found.setdefault(key(flow), ([], []))[side].append(flow)
    return [(tuple(some), tuple(others)) for some, others in found.values() if some and others]


def _without(flows: Iterable[Flow], rows: Iterable[Row]) -> list[Flow]:
    placed = {id(flow) for row in rows for flow in (*row.base, *row.head)}
    return [flow for flow in flows if id(flow) not in placed]


def _equal(base: Sequence[Flow], head: Sequence[Flow]) -> bool:
    """The same bytes over the same links in the same dtypes. Without a machine no links are known."""
    before, after = _sum(base), _sum(head)
    if not (_tiers(base) and _tiers(head)):
        before, after = _unpriced(before), _unpriced(after)
    elif _tiers(base) != _tiers(head):
        return False
    dtypes = [{dtype for flow in side for dtype in flow.dtypes} for side in (base, head)]
    return dtypes[0] == dtypes[1] and before.bytes_equal(after)


def _changed(base: tuple[Flow, ...], head: tuple[Flow, ...]) -> Row:
    tiers = _tiers(base), _tiers(head)
    moved = ("tier",) if all(tiers) and tiers[0] != tiers[1] else ()
    sizes = _size(_sum(base)), _size(_sum(head))
    what: What = "grew" if sizes[1] > sizes[0] else "shrank" if sizes[1] < sizes[0] else "changed"
    if moved and what == "changed":
        what = "moved"
    return Row(what=what, base=base, head=head, moved=moved)


def _moved(name: str, base: Flow, head: Flow) -> Row:
    tier = ("tier",) if base.tiers and head.tiers and base.tiers != head.tiers else ()
    return Row(what="moved", base=(base,), head=(head,), moved=(name, *tier))


def _sum(flows: Iterable[Flow]) -> Amounts:
    return total(flow.amounts for flow in flows)


def _unpriced(amounts: Amounts) -> Amounts:
    return Amounts(payload_bytes=amounts.payload_bytes, wire_bytes=amounts.wire_bytes)


def _tiers(flows: Iterable[Flow]) -> set[str]:
    return {tier for flow in flows for tier in flow.tiers}


def _size(amounts: Amounts) -> tuple[tuple[bool, Fraction], ...]:
    """Larger is more: what is sent at most (unknown above all), then at least, then the payload."""
    ends = (*reversed(amounts.wire_bytes), *reversed(amounts.payload_bytes))
    return tuple((end is None, Fraction(0) if end is None else end) for end in ends)


def _largest_first(row: Row) -> tuple[object, ...]:
    """By how much what is sent changed, then by how much is sent at all, then by meaning."""
    before, after = row.before.wire_bytes, row.after.wire_bytes
    keys = [sorted("|".join(flow.key) for flow in side) for side in (row.base, row.head)]
    return _most(minus(after, before)), min(_most(before), _most(after)), sorted(keys)


def _most(value: ByteRange) -> tuple[bool, Fraction]:
    """Sorts the largest first, unknown before all."""
    low, high = value
    return high is not None, -abs(low if high is None else high)
