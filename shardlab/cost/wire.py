"""Payload, wire and fabric bytes of one execution of a collective, exactly (DESIGN section 3).

S follows nccl-tests (doc/PERFORMANCE.md): the full array. Wire bytes are what one device sends with a
bandwidth-optimal algorithm; where devices differ it is the busiest one. Fabric bytes are the sum over all
devices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

_SHARE = frozenset({"reduce-scatter", "all-to-all"})
_WHOLE = frozenset({"collective-broadcast", "ragged-all-to-all"})
POINT_TO_POINT = frozenset({"collective-permute", "send"})
KINDS = frozenset({"all-reduce", "all-gather"}) | _SHARE | _WHOLE | POINT_TO_POINT


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """Bytes of one execution: `payload_bytes` S, `wire_bytes` of the busiest device, `fabric_bytes` of all
    devices.
    """

    payload_bytes: int
    wire_bytes: Fraction
    fabric_bytes: Fraction


def wire_of(
    *,
    kind: str,
    operand_bytes: int,
    result_bytes: int,
    groups: Sequence[Sequence[int]] = (),
    pairs: Sequence[tuple[int, int]] = (),
) -> Wire:
    """Bytes of one execution.

    operand_bytes, result_bytes: on one device. groups: devices of each group; pairs: (source, target) of a
    permute or a send. Raises ValueError for a `kind` that is not in KINDS.
    """
    if kind not in KINDS:
        raise ValueError(f"no wire formula for {kind!r}")
    payload = result_bytes if kind == "all-gather" else operand_bytes
    if kind in POINT_TO_POINT:
        senders = len({source for source, target in pairs if source != target})
        sent = Fraction(operand_bytes if senders else 0)
        return Wire(payload_bytes=payload, wire_bytes=sent, fabric_bytes=sent * senders)
    counts = Counter(map(len, groups))
    sent_by_size = {size: _sent(kind, operand_bytes, size) for size in counts}
    return Wire(
        payload_bytes=payload,
        wire_bytes=max(sent_by_size.values(), default=Fraction(0)),
        fabric_bytes=sum(
            (counts[size] * _of_group(kind, size, sent) for size, sent in sent_by_size.items()), Fraction(0)
        ),
    )


def _sent(kind: str, operand_bytes: int, size: int) -> Fraction:
    """What one device of a group of `size` sends."""
    if size < 2:
        return Fraction(0)
    if kind == "all-gather":
        return Fraction((size - 1) * operand_bytes)
    if kind in _WHOLE:
        return Fraction(operand_bytes)
    return Fraction(size - 1, size) * operand_bytes * (2 if kind == "all-reduce" else 1)


def _of_group(kind: str, size: int, sent: Fraction) -> Fraction:
    """A broadcast is forwarded by all members but the last; in everything else all members send alike."""
    return sent * (size - 1 if kind == "collective-broadcast" else size)
