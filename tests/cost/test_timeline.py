"""Timelines of small scheduled programs against what can be worked out by hand, or tick by tick."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlab.attribute.calls import call_graph
from shardlab.cost.timeline import Timeline, simulate
from shardlab.cost.walk import Kernel, Place, Transfer
from shardlab.hlo.reader import parse

SECONDS = {"a": 3.0, "b": 4.0, "c": 5.0}  # the kernels of every program here


def kernel(name: str, time_s: float | None) -> Kernel:
    return Kernel(name=name, kind="fusion", layer="layers/mlp", phase="forward", time_s=time_s)


def transfer(name: str = "ag", time_s: float | None = 5.0, **changes: object) -> Transfer:
    made = Transfer(
        name=name,
        kind="all-gather",
        axes=("fsdp",),
        layer="layers/mlp",
        phase="forward",
        stream="collectives",
        time_s=time_s,
        tier_s={"nvlink": time_s or 0.0},
        asynchronous=True,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def program(main: str, others: str = "") -> str:
    return (
        "HloModule step, is_scheduled=true, num_partitions=8\n\n"
        + others
        + "ENTRY main {\n  p = f32[8]{0} parameter(0)\n"
        + "".join(f"  {line}\n" for line in main.strip().splitlines())
        + "}\n"
    )


def run(
    text: str,
    transfers: Sequence[Transfer] = (),
    seconds: Mapping[str, float | None] = SECONDS,
    *,
    slowdown: float = 1.0,
) -> Timeline:
    """Kernels are the instructions named in `seconds`; a transfer starts at the instruction of its name."""
    (module,) = parse(text)
    kernels: dict[Place, Kernel] = {}
    moving: dict[Place, tuple[Transfer, ...]] = {}
    for computation in module.computations.values():
        for name in computation.instructions:
            if name in seconds:
                kernels[computation.name, name] = kernel(name, seconds[name])
            found = tuple(one for one in transfers if one.name == name)
            if found:
                moving[computation.name, name] = found
    return simulate(module, call_graph(module), kernels, moving, slowdown=slowdown)


def figures(line: Timeline) -> tuple[float | None, ...]:
    """Step, compute, communication, exposed."""
    return line.step_time_s, line.compute_s, line.communication_s, line.exposed_communication_s


ALONE = program("ROOT a = f32[8]{0} negate(p)")
BLOCKING = program("ag = f32[64]{0} all-gather(p), dimensions={0}\nROOT a = f32[8]{0} negate(p)")
OVERLAPPING = program(
    """
ag = (f32[8]{0}, f32[64]{0}) all-gather-start(p), dimensions={0}
a = f32[8]{0} negate(p)
done = f32[64]{0} all-gather-done(ag)
ROOT b = f32[8]{0} negate(a)
"""
)
TWO = program(
    """
ag = (f32[8]{0}, f32[64]{0}) all-gather-start(p), dimensions={0}
rs = (f32[8]{0}, f32[64]{0}) all-gather-start(p), dimensions={0}
done = f32[64]{0} all-gather-done(ag)
a = f32[8]{0} negate(p)
ROOT done2 = f32[64]{0} all-gather-done(rs)
"""
)


def test_one_kernel() -> None:
    assert figures(run(ALONE)) == (3, 3, 0, 0)


def test_a_synchronous_collective_holds_up_everything() -> None:
    assert figures(run(BLOCKING, [transfer(asynchronous=False)])) == (8, 3, 5, 5)


@pytest.mark.parametrize(("time_s", "exposed"), [(2.0, 0.0), (3.0, 0.0), (5.0, 2.0)])
def test_what_is_hidden_does_not_count_twice(time_s: float, exposed: float) -> None:
    assert figures(run(OVERLAPPING, [transfer(time_s=time_s)])) == (7 + exposed, 7, time_s, exposed)


def test_one_stream_does_one_thing_after_the_other() -> None:
    """ag until 5, rs from 5 to 7; a from 5 to 8."""
    line = run(TWO, [transfer(), transfer("rs", 2.0)])
    assert figures(line) == (8, 3, 7, 5)


def test_two_streams_share_a_tier() -> None:
    """Both at half the rate: rs has its 2 at 4, ag its last 3 alone at 7; a until 10."""
    line = run(TWO, [transfer(), transfer("rs", 2.0, stream="p2p")])
    assert figures(line) == (10, 3, 7, 7)


def test_a_tier_that_both_need_in_part_is_shared_in_part() -> None:
    """ag needs all of the NICs and half of NVLink, rs all of NVLink: 1.5 NVLinks, so both go at 2/3. rs has
    its 2 at 3, ag 2 of its 5 then, and the rest alone at 6."""
    nic = transfer(tier_s={"infiniband": 5.0, "nvlink": 2.5})
    line = run(TWO, [nic, transfer("rs", 2.0, stream="p2p")])
    assert line.step_time_s == pytest.approx(6 + 3)


def test_axes_of_a_torus_have_links_of_their_own() -> None:
    ici = {"tier_s": {"ici": 5.0}, "stream": "ici fsdp"}
    other = transfer("rs", 5.0, axes=("tensor",), tier_s={"ici": 5.0}, stream="ici tensor")
    assert figures(run(TWO, [transfer(**ici), other])) == (8, 3, 5, 5)
    both = replace(other, axes=("fsdp", "tensor"))
    assert figures(run(TWO, [transfer(**ici), both])) == (13, 3, 10, 10)


LOOPS = """\
inner { s = (s32[], f32[8]{0}) parameter(0)
  i = s32[] get-tuple-element(s), index=0
  one = s32[] constant(1)
  next = s32[] add(i, one)
  x = f32[8]{0} get-tuple-element(s), index=1
  ag = (f32[8]{0}, f32[64]{0}) all-gather-start(x), dimensions={0}
  a = f32[8]{0} negate(x)
  done = f32[64]{0} all-gather-done(ag)
  ROOT out = (s32[], f32[8]{0}) tuple(next, a) }

below5 { s.1 = (s32[], f32[8]{0}) parameter(0)
  j = s32[] get-tuple-element(s.1), index=0
  five = s32[] constant(5)
  ROOT less = pred[] compare(j, five), direction=LT }

outer { s.2 = (s32[], f32[8]{0}) parameter(0)
  i.2 = s32[] get-tuple-element(s.2), index=0
  one.2 = s32[] constant(1)
  next.2 = s32[] add(i.2, one.2)
  x.2 = f32[8]{0} get-tuple-element(s.2), index=1
  b = f32[8]{0} negate(x.2)
  zero.2 = s32[] constant(0)
  first.2 = (s32[], f32[8]{0}) tuple(zero.2, b)
  loop.2 = (s32[], f32[8]{0}) while(first.2), condition=below5, body=inner
  y = f32[8]{0} get-tuple-element(loop.2), index=1
  ROOT out.2 = (s32[], f32[8]{0}) tuple(next.2, y) }

below4 { s.3 = (s32[], f32[8]{0}) parameter(0)
  j.3 = s32[] get-tuple-element(s.3), index=0
  four = s32[] constant(4)
  ROOT less.3 = pred[] compare(j.3, four), direction=LT }

"""
NESTED = program(
    """
zero = s32[] constant(0)
first = (s32[], f32[8]{0}) tuple(zero, p)
ROOT loop = (s32[], f32[8]{0}) while(first), condition=below4, body=outer
""",
    LOOPS,
)


def test_loops_multiply() -> None:
    """4 x (b + 5 x (a beside a transfer of 5)): 4 x (4 + 5 x 5), of which 5 x 2 are exposed."""
    assert figures(run(NESTED, [transfer()])) == (4 * (4 + 25), 4 * (4 + 15), 4 * 25, 4 * 10)


def test_a_loop_that_cannot_be_bounded_has_no_time() -> None:
    endless = NESTED.replace("four = s32[] constant(4)", "four = s32[] rng-get-and-update-state()")
    line = run(endless, [transfer()])
    assert line.step_time_s is None and line.compute_s is None and not line.critical_path
    assert line.unknown == ("loop",)


@pytest.mark.parametrize(
    ("seconds", "transfers", "unknown"),
    [({"a": None, "b": 1.0}, [transfer()], ("a",)), (SECONDS, [transfer(time_s=None)], ("ag",))],
)
def test_what_is_not_known_is_named(
    seconds: dict[str, float | None], transfers: list[Transfer], unknown: tuple[str, ...]
) -> None:
    line = run(OVERLAPPING, transfers, seconds)
    assert (line.step_time_s, line.unknown) == (None, unknown)


def test_a_transfer_goes_on_beside_a_loop() -> None:
    """A loop of 5 x 3 beside a transfer of 20 that starts before it: 5 are left over."""
    text = program(
        """
rs = (f32[8]{0}, f32[64]{0}) all-gather-start(p), dimensions={0}
zero = s32[] constant(0)
first = (s32[], f32[8]{0}) tuple(zero, p)
loop = (s32[], f32[8]{0}) while(first), condition=below5, body=inner
ROOT done2 = f32[64]{0} all-gather-done(rs)
""",
        LOOPS,
    )
    assert figures(run(text, [transfer("rs", 20.0)])) == (20, 15, 20, 5)
    # With a transfer of 1 in each trip of 3 the tier is a third full: 15 of the loop carry 15 / (4/3) of 20.
    shared = run(text, [transfer("rs", 20.0), transfer("ag", 1.0)])
    assert shared.step_time_s == pytest.approx(15 + 20 - 15 / (4 / 3))


BRANCHES = """\
yes { x = f32[8]{0} parameter(0)
  ROOT a = f32[8]{0} negate(x) }

no { x.1 = f32[8]{0} parameter(0)
  ROOT c = f32[8]{0} negate(x.1) }

"""


def test_the_dearest_branch_counts() -> None:
    text = program(
        "which = pred[] parameter(1)\n"
        "ROOT r = f32[8]{0} conditional(which, p, p), true_computation=yes, false_computation=no",
        BRANCHES,
    )
    assert figures(run(text)) == (5, 5, 0, 0)


def test_the_branch_that_is_known_to_run_counts() -> None:
    text = program(
        "which = pred[] constant(true)\n"
        "ROOT r = f32[8]{0} conditional(which, p, p), true_computation=yes, false_computation=no",
        BRANCHES,
    )
    assert figures(run(text)) == (3, 3, 0, 0)


def test_called_computations_count_where_they_are_called() -> None:
    text = program(
        "one = f32[8]{0} call(p), to_apply=yes\nROOT two = f32[8]{0} call(one), to_apply=no", BRANCHES
    )
    assert figures(run(text)) == (8, 8, 0, 0)


def test_a_chain_ends_at_the_fusion_that_ends_it() -> None:
    """A TPU transfer that `b` ends: it began at `ag`, and `a` hides 3 of its 5."""
    text = program("ag = f32[8]{0} negate(p)\na = f32[8]{0} negate(ag)\nROOT b = f32[8]{0} negate(a)")
    assert figures(run(text, [transfer(done="b")])) == (5, 3, 5, 2)


def test_copies_run_beside_compute_and_are_no_communication() -> None:
    text = program(
        "c = (f32[8]{0}, f32[8]{0}, u32[]) copy-start(p)\n"
        "a = f32[8]{0} negate(p)\nROOT done = f32[8]{0} copy-done(c)"
    )
    assert figures(run(text)) == (5, 3, 0, 0)


def test_a_straggler_s_compute_is_slower_and_its_links_are_not() -> None:
    assert figures(run(OVERLAPPING, [transfer()], slowdown=2.0)) == (14, 14, 5, 0)


def test_a_module_without_a_schedule_has_no_timeline() -> None:
    with pytest.raises(ValueError, match="not scheduled"):
        run(ALONE.replace(", is_scheduled=true", ""))


def test_the_critical_path_is_what_the_step_waits_for() -> None:
    line = run(OVERLAPPING, [transfer()])
    assert [(entry.name, entry.time_s, entry.stream) for entry in line.critical_path] == [
        ("ag", 5, "collectives"),
        ("b", 4, "compute"),
    ]
    hidden = run(OVERLAPPING, [transfer(time_s=1.0)])
    assert [entry.name for entry in hidden.critical_path] == ["b", "a"]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("kernel"), st.integers(1, 4), st.just(0)),
        st.tuples(st.just("start"), st.integers(1, 6), st.integers(0, 1)),
        st.tuples(st.just("wait"), st.integers(0, 5), st.just(0)),
    ),
    max_size=14,
)


def written(steps: Sequence[tuple[str, int, int]]) -> tuple[str, list[Transfer], dict[str, float | None]]:
    """A program of these steps; two streams on tiers of their own."""
    lines, transfers, seconds = [], list[Transfer](), dict[str, float | None]()
    for at, (what, number, stream) in enumerate(steps):
        if what == "kernel":
            lines.append(f"k{at} = f32[8]{{0}} negate(p)")
            seconds[f"k{at}"] = float(number)
        elif what == "start":
            lines.append(f"t{at} = (f32[8]{{0}}, f32[64]{{0}}) all-gather-start(p), dimensions={{0}}")
            tier = ("nvlink", "infiniband")[stream]
            transfers.append(transfer(f"t{at}", float(number), stream=tier, tier_s={tier: float(number)}))
        elif transfers:
            which = transfers[number % len(transfers)].name
            lines.append(f"w{at} = f32[64]{{0}} all-gather-done({which})")
    return program("\n".join([*lines, "ROOT r = f32[8]{0} bitcast(p)"])), transfers, seconds


class Ticked:
    """The same, second by second: the first unfinished transfer of each stream counts down."""

    def __init__(self) -> None:
        self.queues: tuple[list[list[int]], list[list[int]]] = ([], [])
        self.started: list[list[int]] = []
        self.moving = self.computing = self.exposed = self.now = 0

    def run(self, steps: Sequence[tuple[str, int, int]]) -> tuple[float, float, float, float]:
        for what, number, stream in steps:
            if what == "kernel":
                for _ in range(number):
                    self.tick(True)
            elif what == "start":
                self.started.append([number])
                self.queues[stream].append(self.started[-1])
            elif self.started:
                self.wait(self.started[number % len(self.started)])
        for one in self.started:  # what is left is awaited at the end
            self.wait(one)
        return self.now, self.computing, self.moving, self.exposed

    def wait(self, one: list[int]) -> None:
        while one[0]:
            self.tick(False)

    def tick(self, compute: bool) -> None:
        heads = [next((one for one in queue if one[0]), None) for queue in self.queues]
        for head in heads:
            if head is not None:
                head[0] -= 1
        moved = any(head is not None for head in heads)
        self.now, self.moving, self.computing = self.now + 1, self.moving + moved, self.computing + compute
        self.exposed += moved and not compute


@given(STEPS)
@settings(max_examples=150, deadline=None)
def test_any_program_takes_what_it_takes_second_by_second(steps: list[tuple[str, int, int]]) -> None:
    text, transfers, seconds = written(steps)
    line = run(text, transfers, seconds)
    assert figures(line) == pytest.approx(Ticked().run(steps))
    assert sum(entry.time_s for entry in line.critical_path) == pytest.approx(line.step_time_s)


def test_a_flow_that_ends_as_time_is_asked_for_is_served_once() -> None:
    """0.1 + 0.2 is not 0.3: rounding neither stalls nor loses a transfer."""
    steps = [0.1, 0.2, 0.3, 1e-9, 0.7]
    lines = "\n".join(f"k{n} = f32[8]{{0}} negate(p)" for n in range(len(steps)))
    text = program(
        "ag = (f32[8]{0}, f32[64]{0}) all-gather-start(p), dimensions={0}\n"
        + lines
        + "\nROOT done = f32[64]{0} all-gather-done(ag)"
    )
    line = run(text, [transfer(time_s=sum(steps))], {f"k{n}": each for n, each in enumerate(steps)})
    assert line.step_time_s == pytest.approx(sum(steps))
    assert line.exposed_communication_s == pytest.approx(0, abs=1e-12)
