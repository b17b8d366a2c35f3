"""A loop over ticks whose devices take branches of their own: the stages of a pipeline, side by side.

At each tick a stage runs the branch that the table says, and ends when those that it exchanges with at that
tick have ended too: a transfer needs both of its devices. What a stage waits for others is the bubble.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from shardlab.cost.blocks import Block, Event, PathEntry, merged_path, scaled_path

WAIT = "wait"  # the kind of a path's entry for other stages


def staged(
    name: str, ticks: int, kinds: Sequence[int], block: Callable[[int, int], Block]
) -> Mapping[int, Block]:
    """The loop `name` on each kind of device. block: what a kind runs at a tick; its `joins` name the kinds
    that it exchanges with there.
    """
    ends = dict.fromkeys(kinds, 0.0)
    runs: dict[int, list[Event]] = {kind: [] for kind in kinds}
    for tick in range(ticks):
        found = {kind: block(kind, tick) for kind in kinds}
        own = {kind: ends[kind] + found[kind].duration_s for kind in kinds}
        beside: dict[int, set[int]] = {kind: {kind} for kind in kinds}
        for one, other in {pair for each in found.values() for pair in each.joins}:
            beside.get(one, set()).add(other)
            beside.get(other, set()).add(one)
        for kind in kinds:
            if found[kind].duration_s:
                runs[kind].append(_event(f"{name} tick {tick}", found[kind], ends[kind]))
        ends = {kind: max(own[other] for other in beside[kind] if other in own) for kind in kinds}
    return {kind: _joined(name, runs[kind], ends[kind]) for kind in kinds}


def _event(name: str, body: Block, start_s: float) -> Event:
    return Event(
        name=name,
        kind="tick",
        stream="compute",
        start_s=start_s,
        duration_s=body.duration_s,
        body=body,
    )


def _joined(name: str, ticks: Sequence[Event], end_s: float) -> Block:
    """The ticks of one device as a block."""
    bodies = [event.body for event in ticks if event.body is not None]
    waited_s = max(end_s - sum(body.duration_s for body in bodies), 0.0)
    path = [entry for body in bodies for entry in scaled_path(body, 1.0)]
    if waited_s > 0:
        path.append(
            PathEntry(name=name, kind=WAIT, stream="other stages", layer="", axes=None, time_s=waited_s)
        )
    return Block(
        events=tuple(ticks),
        duration_s=end_s,
        compute_s=sum(body.compute_s for body in bodies),
        communication_s=sum(body.communication_s for body in bodies),
        exposed_s=sum(body.exposed_s for body in bodies),
        path=merged_path(path),
        waited_s=waited_s,
        joins=frozenset(pair for body in bodies for pair in body.joins),
    )
