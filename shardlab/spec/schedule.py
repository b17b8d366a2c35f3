"""Pipeline schedules as data: which stage does what at which tick. Pure Python, no jax.

A stage holds `virtual` chunks of consecutive layers; chunk c of stage s is link c·p + s of the whole chain.
One tick is one work item: the forward (F) or the backward (B) of one chunk for one microbatch; zero-bubble
schedules split the backward into the input's gradient (B) and the weights' (W). What a tick produces has
reached its neighbour at the next tick.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, NamedTuple

Kind = Literal["F", "B", "W"]


class Work(NamedTuple):
    """One work item of a stage."""

    kind: Kind
    microbatch: int
    chunk: int = 0


Row = tuple[Work | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """rows: for each tick what each stage does, None when it is idle."""

    name: str
    stages: int
    microbatches: int
    virtual: int
    rows: tuple[Row, ...]

    @property
    def links(self) -> int:
        """Chunks of the whole chain."""
        return self.stages * self.virtual

    @property
    def bubble(self) -> Fraction:
        """Idle over all ticks of the table."""
        idle = sum(work is None for row in self.rows for work in row)
        return Fraction(idle, len(self.rows) * self.stages)

    def items(self) -> Iterator[tuple[int, int, Work]]:
        """(tick, stage, work) of everything that is done, tick by tick."""
        for tick, row in enumerate(self.rows):
            yield from ((tick, stage, work) for stage, work in enumerate(row) if work is not None)


def gpipe(stages: int, microbatches: int) -> Schedule:
    """All forwards, then all backwards: every stage keeps all microbatches (Huang et al. 2019,
    arXiv:1811.06965, figure 2c)."""
    turn = microbatches + stages - 1
    placed = {}
    for stage in range(stages):
        for i in range(microbatches):
            placed[i + stage, stage] = Work("F", i)
            placed[turn + stages - 1 - stage + i, stage] = Work("B", i)
    return _schedule("gpipe", stages, microbatches, 1, placed)


def one_forward_one_backward(stages: int, microbatches: int) -> Schedule:
    """PipeDream-flush: stage s keeps at most p - s microbatches (Narayanan et al. 2021, arXiv:2104.04473,
    section 2.2.1).

    Each forward is as late as the backward that it feeds allows, which changes neither the order on a stage
    nor the number of ticks; a stage then sends forward at ticks of its own parity and backward at the others.
    """
    placed = {}
    for stage in range(stages):
        for i in range(microbatches):
            placed[stage + 2 * i, stage] = Work("F", i)
            placed[2 * stages - 1 - stage + 2 * i, stage] = Work("B", i)
    return _schedule("1f1b", stages, microbatches, 1, placed)


def interleaved(stages: int, microbatches: int, virtual: int) -> Schedule:
    """1F1B over `virtual` chunks per stage, microbatches a multiple of the stages (Narayanan et al. 2021,
    section 2.2.2).

    The order on each stage is Megatron-LM's (`forward_backward_pipelining_with_interleaving`): groups of p
    microbatches through one chunk after the other; (p - s - 1)·2 + (v - 1)·p forwards before the first pair.

    A loop over ticks does not gain what the bubble promises. Stages that exchange at the end of a tick wait
    for each other, and around the ring that the chunks make all keep in step: a pair of ticks takes 2·T_B.
    1F1B's stages are a chain, each a little later than its neighbour, and take T_F + T_B.
    """
    total = microbatches * virtual

    def unit(k: int, kind: Kind) -> Work:
        chunk = k // stages % virtual
        microbatch = k // (stages * virtual) * stages + k % stages
        return Work(kind, microbatch, chunk if kind == "F" else virtual - 1 - chunk)

    orders = []
    for stage in range(stages):
        warmup = min((stages - stage - 1) * 2 + (virtual - 1) * stages, total)
        order = [unit(k, "F") for k in range(warmup)]
        for k in range(total - warmup):
            order += [unit(warmup + k, "F"), unit(k, "B")]
        orders.append(order + [unit(k, "B") for k in range(total - warmup, total)])
    return _in_order("interleaved", stages, microbatches, virtual, orders)


def zb_h1(stages: int, microbatches: int) -> Schedule:
    """Zero bubble, first handcrafted form: no stage keeps more than 1F1B's first does, and the weights'
    gradients fill what would be idle (Qi et al. 2023, arXiv:2401.10241, section 2.1, figure 3).

    Stage s starts with p - s forwards and does each weight gradient s microbatches late, so that at most p
    forwards wait for theirs.
    """
    orders = []
    for stage in range(stages):
        ahead = stages - stage
        order = [Work("F", i) for i in range(min(ahead, microbatches))]
        for i in range(microbatches):
            order.append(Work("B", i))
            if i >= stage:
                order.append(Work("W", i - stage))
            if i + ahead < microbatches:
                order.append(Work("F", i + ahead))
        late = range(max(microbatches - stage, 0), microbatches)
        orders.append(order + [Work("W", i) for i in late])
    return _in_order("zb-h1", stages, microbatches, 1, orders)


def _in_order(name: str, stages: int, microbatches: int, virtual: int, orders: list[list[Work]]) -> Schedule:
    """Each stage does its list in order, each item as soon as what it needs has arrived."""
    links = stages * virtual
    done: dict[tuple[str, int, int], int] = {}
    position = [0] * stages
    placed: dict[tuple[int, int], Work] = {}
    tick = 0
    while any(position[s] < len(orders[s]) for s in range(stages)):
        for stage in range(stages):
            if position[stage] == len(orders[stage]):
                continue
            work = orders[stage][position[stage]]
            needs = needed(work, work.chunk * stages + stage, links)
            if all(done.get(key, tick) < tick for key in needs):
                placed[tick, stage] = work
                done[work.kind, work.microbatch, work.chunk * stages + stage] = tick
                position[stage] += 1
        tick += 1
    return _schedule(name, stages, microbatches, virtual, placed)


def needed(work: Work, link: int, links: int) -> tuple[tuple[str, int, int], ...]:
    """(kind, microbatch, link) of everything that must be done at an earlier tick."""
    i = work.microbatch
    if work.kind == "F":
        return () if link == 0 else (("F", i, link - 1),)
    if work.kind == "W":
        return (("B", i, link),)
    return (("F", i, link),) if link == links - 1 else (("F", i, link), ("B", i, link + 1))


def _schedule(
    name: str, stages: int, microbatches: int, virtual: int, placed: Mapping[tuple[int, int], Work]
) -> Schedule:
    ticks = 1 + max(tick for tick, _ in placed)
    rows = tuple(tuple(placed.get((tick, stage)) for stage in range(stages)) for tick in range(ticks))
    return Schedule(name=name, stages=stages, microbatches=microbatches, virtual=virtual, rows=rows)


_GENERATORS: Mapping[str, Callable[[int, int], Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_forward_one_backward,
    "zb-h1": zb_h1,
}


def make_schedule(name: str, stages: int, microbatches: int, virtual: int = 1) -> Schedule:
    """The schedule that `[method] pipeline` names. interleaved: microbatches a multiple of the stages."""
    if name == "interleaved":
        return interleaved(stages, microbatches, virtual)
    return _GENERATORS[name](stages, microbatches)


def published_bubble(name: str, stages: int, microbatches: int, virtual: int = 1) -> Fraction:
    """Idle over all ticks as the papers have it, one tick per F, B and W of a chunk.

    GPipe and 1F1B: (p-1)/(m+p-1) (arXiv:2104.04473, section 2.2.1, over the whole time). Interleaved: the
    idle ticks stay 2(p-1) while a stage works for 2mv: (p-1)/(mv+p-1) (section 2.2.2). ZB-H1: the idle time
    is (p-1)(T_F + T_B - T_W) (arXiv:2401.10241, table 2), here p-1 ticks beside 3m: (p-1)/(3m+p-1); from
    m >= p on.
    """
    idle = stages - 1
    busy = {"interleaved": microbatches * virtual, "zb-h1": 3 * microbatches}.get(name, microbatches)
    return Fraction(idle, busy + idle)


def faults(schedule: Schedule) -> list[str]:
    """What is wrong with a schedule: each item must be done once on each link, after all that it needs."""
    problems: list[str] = []
    links, kinds = schedule.links, {work.kind for _, _, work in schedule.items()}
    done: dict[tuple[str, int, int], int] = {}
    for tick, stage, work in schedule.items():
        link = work.chunk * schedule.stages + stage
        key = (work.kind, work.microbatch, link)
        if key in done:
            problems.append(f"{work} twice on stage {stage}")
        problems += [
            f"{work} on stage {stage} at tick {tick} before {need}"
            for need in needed(work, link, links)
            if done.get(need, tick) >= tick
        ]
        done[key] = tick
    expected = len(kinds | {"F", "B"}) * schedule.microbatches * links
    if len(done) != expected:
        problems.append(f"{len(done)} items instead of {expected}")
    return problems


def in_flight(schedule: Schedule) -> tuple[int, ...]:
    """For each stage, the most chunk inputs that wait for their backward at one time."""
    now, most = [0] * schedule.stages, [0] * schedule.stages
    for _, stage, work in schedule.items():
        now[stage] += {"F": 1, "B": -1, "W": 0}[work.kind]
        most[stage] = max(most[stage], now[stage])
    return tuple(most)
