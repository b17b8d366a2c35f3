"""A schedule as the executor reads it: for each tick and stage a branch, and the slots of its buffers.

Slots are given out here, once: a buffer is as deep as the most values that any stage keeps at one time, which
is where a schedule's memory comes from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from shardlab.spec.schedule import Kind, Schedule, Work
from shardlab.spec.stages import StageLayout

Edges = tuple[tuple[int, int], ...]  # (from stage, to stage)
Column = tuple[tuple[int, ...], ...]  # [tick][stage]

NONE = -1
MAX_TRANSFERS = 64  # each is a permute of its own in the compiled program


class Branch(NamedTuple):
    """One kind of tick. first, last: of the whole chain: embedding, head and loss. layers: how many. chunk:
    whose, where chunks have branches of their own; else 0."""

    kind: Kind | Literal["idle"]
    first: bool = False
    last: bool = False
    layers: int = 0
    chunk: int = 0


class Transfer(NamedTuple):
    """Who sends to whom at the end of a tick: activations to the next link, cotangents to the previous."""

    forward: Edges
    backward: Edges

    @property
    def is_permutation(self) -> bool:
        """Whether no stage sends to two, and none gets from two."""
        sources, targets = zip(*edges, strict=True) if (edges := self.forward + self.backward) else ((), ())
        return len(set(sources)) == len(sources) and len(set(targets)) == len(targets)


NOTHING = Transfer((), ())


@dataclass(frozen=True, slots=True, kw_only=True)
class TickTable:
    """Columns [tick][stage] of small integers, and how deep each buffer is (*_slots).

    branch: index into `branches`. microbatch, chunk: of the item. input: slot of the chunk's input until it
    goes forward. stash: slot of what its layers keep until its backward. cotangent: slot of the gradient of
    its output. pair: slot of what a split backward leaves to W. receive_*: where what has arrived goes before
    the tick's work, keep_cotangent: where the gradient of the loss goes after it, -1 for nowhere. transfer:
    for each tick an index into `transfers`.
    """

    branches: tuple[Branch, ...]
    transfers: tuple[Transfer, ...]
    branch: Column
    microbatch: Column
    chunk: Column
    input: Column
    stash: Column
    cotangent: Column
    pair: Column
    receive_input: Column
    receive_cotangent: Column
    keep_cotangent: Column
    transfer: tuple[int, ...]
    input_slots: int
    stash_slots: int
    cotangent_slots: int
    pair_slots: int


@dataclass(slots=True)
class _Slots:
    """Slots of one buffer on one stage, the lowest free one first."""

    held: dict[tuple[int, int], int] = field(default_factory=dict)
    depth: int = 0

    def take(self, key: tuple[int, int]) -> int:
        slot = min(set(range(self.depth + 1)) - set(self.held.values()))
        self.held[key], self.depth = slot, max(self.depth, slot + 1)
        return slot

    def give_back(self, key: tuple[int, int]) -> int:
        return self.held.pop(key)


_COLUMNS = (
    "branch", "microbatch", "chunk", "input", "stash", "cotangent", "pair", "receive_input",
    "receive_cotangent", "keep_cotangent",
)  # fmt: skip


_BUFFERS = ("input", "stash", "cotangent", "pair")


class _Builder:
    """Fills the columns tick by tick: first what each stage does, then what arrives."""

    def __init__(self, schedule: Schedule, layout: StageLayout, apart: bool) -> None:
        self.schedule, self.layout, self.apart = schedule, layout, apart
        self.split = any(work.kind == "W" for _, _, work in schedule.items())
        self.buffers = {name: [_Slots() for _ in range(schedule.stages)] for name in _BUFFERS}
        self.columns = {
            name: [
                [NONE if name.startswith(("receive", "keep")) else 0] * schedule.stages for _ in schedule.rows
            ]
            for name in _COLUMNS
        }
        self.branches: dict[Branch, int] = {Branch("idle"): 0}

    def work(self, tick: int, stage: int, work: Work) -> None:
        """What a stage does: slots taken by what it makes, given back by what it uses up."""
        key, link = (work.microbatch, work.chunk), work.chunk * self.schedule.stages + stage
        first, last = link == 0, link == self.schedule.links - 1
        chunk = work.chunk if self.apart else 0
        input, stash, cotangent, pair = (self.buffers[name][stage] for name in _BUFFERS)
        cell = {"microbatch": work.microbatch, "chunk": work.chunk}
        if work.kind == "F":
            cell["stash"] = stash.take(key)
            if not first:
                cell["input"] = input.give_back(key)
            if last:
                cell["keep_cotangent"] = cotangent.take(key)
            branch = Branch("F", first, last, self.layout.counts[link], chunk)
        elif work.kind == "B":
            cell |= {"stash": stash.give_back(key), "cotangent": cotangent.give_back(key)}
            if self.split:
                cell["pair"] = pair.take(key)
            branch = Branch("B", first, False, self.layout.counts[link], chunk)
        else:
            cell["pair"] = pair.give_back(key)
            branch = Branch("W", False, False, self.layout.counts[link], chunk)
        cell["branch"] = self.branches.setdefault(branch, len(self.branches))
        for name, value in cell.items():
            self.columns[name][tick][stage] = value

    def arrivals(self, tick: int) -> Transfer:
        """Who sends at the end of a tick; the receivers take slots."""
        p, links = self.schedule.stages, self.schedule.links
        edges: dict[str, list[tuple[int, int]]] = {"F": [], "B": []}
        for stage, work in enumerate(self.schedule.rows[tick]):
            if work is None or work.kind == "W":
                continue
            target = work.chunk * p + stage + (1 if work.kind == "F" else -1)
            if not 0 <= target < links:
                continue
            name = "input" if work.kind == "F" else "cotangent"
            slot = self.buffers[name][target % p].take((work.microbatch, target // p))
            self.columns[f"receive_{name}"][tick + 1][target % p] = slot
            edges[work.kind].append((stage, target % p))
        return Transfer(tuple(edges["F"]), tuple(edges["B"]))


def tick_table(schedule: Schedule, layout: StageLayout, *, apart: bool = False) -> TickTable:
    """The table of a schedule on this layout of layers. apart: whether each chunk has its own branches."""
    builder = _Builder(schedule, layout, apart)
    sent = []
    for tick, row in enumerate(schedule.rows):
        for stage, work in enumerate(row):
            if work is not None:
                builder.work(tick, stage, work)
        sent.append(builder.arrivals(tick))
    transfers = largest(sent)
    depth = {name: max(s.depth for s in slots) for name, slots in builder.buffers.items()}
    return TickTable(
        branches=tuple(builder.branches),
        transfers=transfers,
        **{name: tuple(map(tuple, rows)) for name, rows in builder.columns.items()},
        transfer=tuple(_least(s, transfers) for s in sent),
        input_slots=max(depth["input"], 1),
        stash_slots=depth["stash"],
        cotangent_slots=depth["cotangent"],
        pair_slots=depth["pair"],
    )


def largest(sent: list[Transfer]) -> tuple[Transfer, ...]:
    """Few transfers such that what each tick sends is within one of them.

    Two stages wait for each other only where something really passes between them. One permute over all
    pairs at every tick would make every tick as long as the longest item of all stages: 1F1B, where
    neighbours alternate F and B, would take 2·T_B per microbatch instead of T_F + T_B. So: the transfers that
    no other contains, and none at all where many ticks send nothing (two stages); where these are many
    (ramps), the unions of every second or third tick.
    """
    often_none = sent.count(NOTHING) > len(sent) // 4
    distinct = [transfer for transfer in dict.fromkeys(sent) if transfer != NOTHING]
    widest = tuple(a for a in distinct if not any(a != b and _within(a, b) for b in distinct))
    if len(widest) <= MAX_TRANSFERS:
        return (*widest, NOTHING) if often_none or not widest else widest
    periods = [tuple(_union(sent[phase::period]) for phase in range(period)) for period in (1, 2, 3)]
    return min(periods, key=lambda found: sum(len(t.forward) + len(t.backward) for t in found) / len(found))


def _union(sent: list[Transfer]) -> Transfer:
    return Transfer(
        tuple(sorted({edge for t in sent for edge in t.forward})),
        tuple(sorted({edge for t in sent for edge in t.backward})),
    )


def _least(sent: Transfer, transfers: tuple[Transfer, ...]) -> int:
    """Which of the transfers does what is sent, and the least beside it."""
    fitting = [i for i, transfer in enumerate(transfers) if _within(sent, transfer)]
    return min(fitting, key=lambda i: len(transfers[i].forward) + len(transfers[i].backward))


def _within(a: Transfer, b: Transfer) -> bool:
    return set(a.forward) <= set(b.forward) and set(a.backward) <= set(b.backward)
