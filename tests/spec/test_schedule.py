"""Schedules: every item once and in order, idle ticks as the papers have them, memory as they promise."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlab.spec.schedule import Schedule, Work, faults, in_flight, make_schedule, needed, published_bubble
from shardlab.spec.stages import StageLayout, split_layers
from shardlab.spec.tick_table import NONE, TickTable, Transfer, tick_table

NAMES = ("gpipe", "1f1b", "interleaved", "zb-h1")


@st.composite
def asked(draw: st.DrawFn) -> tuple[str, int, int, int]:
    """(name, stages, microbatches, virtual stages); the papers' formulas hold from m >= p on."""
    name = draw(st.sampled_from(NAMES))
    stages = draw(st.integers(1, 9))
    if name == "interleaved":
        return name, stages, stages * draw(st.integers(1, 5)), draw(st.integers(2, 4))
    return name, stages, draw(st.integers(stages, 5 * stages)), 1


@settings(max_examples=50, deadline=None)
@given(asked())
def test_every_item_is_done_once_and_the_bubble_is_the_published_one(case: tuple[str, int, int, int]) -> None:
    schedule = make_schedule(*case)
    assert faults(schedule) == []
    assert schedule.bubble == published_bubble(*case)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(["gpipe", "1f1b", "zb-h1"]), st.integers(1, 8), st.integers(1, 8))
def test_fewer_microbatches_than_stages_are_scheduled_too(name: str, stages: int, microbatches: int) -> None:
    assert faults(make_schedule(name, stages, microbatches)) == []


@settings(max_examples=50, deadline=None)
@given(asked())
def test_no_stage_keeps_more_than_the_schedule_promises(case: tuple[str, int, int, int]) -> None:
    """GPipe all microbatches; 1F1B p - s; interleaved what Megatron-LM warms up with, and one."""
    name, p, m, v = case
    promised = {
        "gpipe": [m] * p,
        "1f1b": [p - s for s in range(p)],
        "zb-h1": [p - s for s in range(p)],
        "interleaved": [min((p - s - 1) * 2 + (v - 1) * p + 1, m * v) for s in range(p)],
    }
    assert list(in_flight(make_schedule(*case))) == promised[name]


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 9), st.integers(1, 4))
def test_zero_bubble_keeps_p_factors_at_most(stages: int, groups: int) -> None:
    schedule = make_schedule("zb-h1", stages, stages * groups)
    waiting, most = [0] * stages, 0
    for _, stage, work in schedule.items():
        waiting[stage] += {"F": 1, "B": 0, "W": -1}[work.kind]
        most = max(most, waiting[stage])
    assert most == stages


def broken(schedule: Schedule, tick: int, stage: int, work: Work | None) -> Schedule:
    rows = [list(row) for row in schedule.rows]
    rows[tick][stage] = work
    return replace(schedule, rows=tuple(map(tuple, rows)))


@pytest.mark.parametrize(
    ("tick", "stage", "work", "fault"),
    [
        pytest.param(0, 0, None, "instead of", id="an item is missing"),
        pytest.param(0, 1, Work("F", 0), "twice", id="an item is done twice"),
        pytest.param(0, 1, Work("F", 0), "before", id="an item comes before its needs"),
    ],
)
def test_faults_are_found(tick: int, stage: int, work: Work | None, fault: str) -> None:
    found = faults(broken(make_schedule("1f1b", 2, 2), tick, stage, work))
    assert any(fault in sentence for sentence in found)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 200), st.integers(1, 16))
def test_layers_are_split_evenly_and_the_ends_go_short(layers: int, links: int) -> None:
    counts = split_layers(max(layers, links), links)
    assert sum(counts) == max(layers, links)
    assert max(counts) - min(counts) <= 1
    assert counts[-1] == min(counts)


def test_llama_405b_goes_short_at_both_ends() -> None:
    """arXiv:2407.21783, section 3.3.2: one layer fewer on the first and on the last of 16 stages."""
    assert split_layers(126, 16) == (7, *(8,) * 14, 7)


@settings(max_examples=50, deadline=None)
@given(asked(), st.integers(0, 7))
def test_the_table_moves_every_value_to_where_it_is_read(case: tuple[str, int, int, int], more: int) -> None:
    """The table run on names in place of arrays: each item finds what its own neighbours made for it."""
    name, p, m, v = case
    layout = StageLayout(stages=p, virtual=v, counts=split_layers(p * v + more, p * v))
    run_on_names(make_schedule(name, p, m, v), layout, tick_table(make_schedule(name, p, m, v), layout))


Name = tuple[str, int, int]  # (x: a link's input, kept: by its layers, g: of its output; i; link)


class NamedStage:
    """One stage of the table, run on names."""

    def __init__(self, stage: int, links: int, table: TickTable) -> None:
        self.stage, self.links, self.table = stage, links, table
        self.inputs: dict[int, Name] = {}
        self.stash: dict[int, Name] = {}
        self.cotangents: dict[int, Name] = {}
        self.pairs: dict[int, Name] = {}

    def at(self, column: str, tick: int) -> int:
        return int(getattr(self.table, column)[tick][self.stage])

    def receive(self, tick: int, x: Name | None, cotangent: Name | None) -> None:
        for kept, column, value in (
            (self.inputs, "receive_input", x),
            (self.cotangents, "receive_cotangent", cotangent),
        ):
            if (slot := self.at(column, tick)) != NONE:
                assert value is not None
                kept[slot] = value

    def do(self, tick: int, work: Work, link: int) -> Name | None:
        """What the item makes for its neighbour."""
        i = work.microbatch
        assert (self.at("microbatch", tick), self.at("chunk", tick)) == (i, work.chunk)
        if work.kind == "F":
            return self.forward(tick, i, link)
        if work.kind == "W":
            assert self.pairs.pop(self.at("pair", tick)) == ("pair", i, link)
            return None
        assert self.stash[self.at("stash", tick)] == ("kept", i, link)
        assert self.cotangents[self.at("cotangent", tick)] == ("g", i, link)
        if self.table.pair_slots:
            self.pairs[self.at("pair", tick)] = ("pair", i, link)
        return "g", i, link - 1

    def forward(self, tick: int, i: int, link: int) -> Name:
        if link > 0:
            assert self.inputs[self.at("input", tick)] == ("x", i, link)
        self.stash[self.at("stash", tick)] = ("kept", i, link)
        if link == self.links - 1:
            self.cotangents[self.at("keep_cotangent", tick)] = ("g", i, link)
        return "x", i, link + 1


def passed(transfer: Transfer, made: list[Name | None]) -> list[list[Name | None]]:
    """What each stage gets, as (activation, cotangent); through one permute both are the same."""
    arrived: list[list[Name | None]] = [[None, None] for _ in made]
    for lane, edges in enumerate(transfer):
        for source, target in edges:
            for to in (0, 1) if transfer.is_permutation else (lane,):
                arrived[target][to] = made[source]
    return arrived


def run_on_names(schedule: Schedule, layout: StageLayout, table: TickTable) -> None:
    p, links = schedule.stages, schedule.links
    stages = [NamedStage(s, links, table) for s in range(p)]
    arrived: list[list[Name | None]] = [[None, None] for _ in range(p)]
    for tick, row in enumerate(schedule.rows):
        made: list[Name | None] = [None] * p
        for s, work in enumerate(row):
            stages[s].receive(tick, *arrived[s])
            branch = table.branches[table.branch[tick][s]]
            assert branch.kind == (work.kind if work else "idle")
            if work is not None:
                link = work.chunk * p + s
                assert branch.layers == layout.counts[link]
                assert branch.first == (link == 0 and work.kind != "W")
                assert branch.last == (link == links - 1 and work.kind == "F")
                made[s] = stages[s].do(tick, work, link)
        arrived = passed(table.transfers[table.transfer[tick]], made)
    for stage in stages:
        assert not stage.pairs
        assert len(stage.inputs) <= table.input_slots
        assert len(stage.stash) <= table.stash_slots


def makespan(schedule: Schedule, table: TickTable, cost: dict[str, int]) -> int:
    """When the last stage is done: a tick takes as long as its item, and a permute waits for both ends."""
    free = [0] * schedule.stages
    for tick, row in enumerate(schedule.rows):
        done = [free[s] + (cost[work.kind] if work else 0) for s, work in enumerate(row)]
        free = list(done)
        for edges in table.transfers[table.transfer[tick]]:
            for source, target in edges:
                free[source] = max(free[source], done[target])
                free[target] = max(free[target], done[source])
    return max(free)


def unhindered(schedule: Schedule, cost: dict[str, int]) -> int:
    """When the last stage is done if each item starts once what it needs is there, and sending is free."""
    done: dict[tuple[str, int, int], int] = {}
    free = [0] * schedule.stages
    for _, stage, work in schedule.items():
        link = work.chunk * schedule.stages + stage
        start = max([free[stage], *(done[need] for need in needed(work, link, schedule.links))])
        done[work.kind, work.microbatch, link] = free[stage] = start + cost[work.kind]
    return max(free)


@pytest.mark.parametrize(
    ("name", "virtual", "cost", "at_least", "at_most"),
    [
        # Recomputation makes a whole backward three forwards long, and a split one 2 + 1.
        pytest.param("gpipe", 1, {"F": 1, "B": 3}, 1.0, 1.0, id="gpipe"),
        pytest.param("1f1b", 1, {"F": 1, "B": 3}, 1.0, 1.0, id="1f1b"),
        pytest.param("zb-h1", 1, {"F": 1, "B": 2, "W": 1}, 1.0, 1.01, id="zb-h1"),
        pytest.param("interleaved", 2, {"F": 1, "B": 3}, 1.3, 1.4, id="interleaved"),
    ],
)
def test_what_waiting_at_every_tick_costs(
    name: str, virtual: int, cost: dict[str, int], at_least: float, at_most: float
) -> None:
    """As quick as stages that run freely, but for the interleaved schedule, whose ring keeps step."""
    schedule = make_schedule(name, 8, 32, virtual)
    layout = StageLayout(stages=8, virtual=virtual, counts=(1,) * 8 * virtual)
    took = makespan(schedule, tick_table(schedule, layout), cost)
    assert at_least <= took / unhindered(schedule, cost) <= at_most


@pytest.mark.parametrize("stages", [2, 4, 8])
def test_stages_wait_only_for_what_passes_between_them(stages: int) -> None:
    """1F1B in (m + p - 1)(T_F + T_B) although neighbours do different items; with one permute over all
    pairs at every tick it would be about 2 m T_B."""
    m, cost = 8 * stages, {"F": 1, "B": 3}
    schedule = make_schedule("1f1b", stages, m)
    layout = StageLayout(stages=stages, virtual=1, counts=(1,) * stages)
    table = tick_table(schedule, layout)
    assert makespan(schedule, table, cost) == (m + stages - 1) * 4
    ring = tuple((s, s + 1) for s in range(stages - 1)), tuple((s + 1, s) for s in range(stages - 1))
    always = replace(table, transfers=(Transfer(*ring),), transfer=(0,) * len(schedule.rows))
    assert makespan(schedule, always, cost) > 1.4 * (m + stages - 1) * 4
