"""Transfers under way at the same time: each stream runs one after the other, streams share the links.

A transfer that alone keeps a link busy for part of its time needs that part of the link. Where the parts of
all that are under way add up to more than one link, each goes as much slower. The model is fluid: rates
change only when a transfer begins or ends.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

_DONE = 1e-15  # seconds of work that are rounding


@dataclass(slots=True)
class Flow:
    """One transfer: `alone_s` when nothing is beside it, and the part of each link that it then needs.

    begin_s, end_s: when it is served, None until known. after: the flow of its stream that it waited for.
    """

    stream: str
    alone_s: float
    needs: Mapping[Hashable, float]
    issued_s: float
    begin_s: float | None = None
    end_s: float | None = None
    after: Flow | None = None
    left_s: float = 0.0


@dataclass(slots=True)
class Flows:
    """The transfers of one block. background: what else keeps links busy meanwhile, as a part of each."""

    now_s: float = 0.0
    background: Mapping[Hashable, float] = field(default_factory=dict)
    _queues: dict[str, list[Flow]] = field(default_factory=dict)

    def start(self, flow: Flow) -> None:
        """Issue a transfer; `flow.issued_s` must not be before what was asked for last."""
        self.advance(flow.issued_s)
        flow.left_s = flow.alone_s
        queue = self._queues.setdefault(flow.stream, [])
        if queue:
            flow.after = queue[-1]
        else:
            flow.begin_s = flow.issued_s
        queue.append(flow)

    def finish(self, flow: Flow) -> float:
        """When a transfer ends, given that nothing else is issued until then."""
        while flow.end_s is None:
            self._step(None)
        return flow.end_s

    def drain(self) -> None:
        """Let all that is under way end."""
        while any(self._queues.values()):
            self._step(None)

    def advance(self, to_s: float) -> None:
        """Let time pass."""
        while self.now_s < to_s and any(self._queues.values()):
            self._step(to_s)
        self.now_s = max(self.now_s, to_s)

    def _step(self, to_s: float | None) -> None:
        """To the next end of a transfer, but not beyond `to_s`."""
        heads = [queue[0] for queue in self._queues.values() if queue]
        load: dict[Hashable, float] = dict(self.background)
        for flow in heads:
            for link, part in flow.needs.items():
                load[link] = load.get(link, 0.0) + part
        rates = [1 / max([1.0, *(load[link] for link in flow.needs)]) for flow in heads]
        step_s = min(flow.left_s / rate for flow, rate in zip(heads, rates, strict=True))
        if to_s is not None:
            step_s = min(step_s, to_s - self.now_s)
        self.now_s += step_s
        for flow, rate in zip(heads, rates, strict=True):
            flow.left_s -= step_s * rate
            if flow.left_s <= _DONE * max(1.0, flow.alone_s):
                self._end(flow)

    def _end(self, flow: Flow) -> None:
        flow.end_s = self.now_s
        queue = self._queues[flow.stream]
        queue.pop(0)
        if queue:
            queue[0].begin_s = self.now_s
