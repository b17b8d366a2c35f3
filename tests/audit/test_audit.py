"""Each rule on a program that has what it looks for, and on one that nearly has.

The programs are real compiles of tests/golden/audit/make.py for eight devices, mesh x=4, y=2; bytes are by
hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from shardlab.analysis import Analysis, analyze, attribute, merge
from shardlab.analysis.build import Source
from shardlab.audit import RULES, Finding, audit, audit_parts, finding_json
from shardlab.compile.logs import warnings
from shardlab.program import Program

GOLDEN = Path(__file__).parents[1] / "golden" / "audit"
# Found, and nearly found: in test_state.py, test_placed.py and test_warned.py.
ELSEWHERE = {"replicated", "slow-tier-by-order", "rematerialized"}
MESH = {"x": 4, "y": 2}
IN_LOOP = 3 * 65_536 - 4 * 8 * 1024
FOUND = [
    # f32[1024,256] over 8: 7 · 128 KiB sent; in bf16 half of it.
    ("gather_then_convert.cpu", "gathered-wide", "all_gather.3", ("x", "y"), 7 * 131_072 // 2),
    # bf16[64,256] shards (libtpu narrows them) over 4: 3 · 32 KiB, sent once too often.
    ("gather_twice.tpu", "gathered-twice", "all_gather.7", ("x",), 3 * 32_768),
    # f32[1024,256] over 8 of which 64 rows (64 KiB) are kept.
    ("gather_then_slice.tpu", "gathered-then-sliced", "all_gather.3", ("x", "y"), 7 * 131_072 - 65_536),
    # bf16[64,256] over 4, on 4 trips: 3 too many.
    ("gather_in_loop.tpu", "gathered-every-trip", "all_gather.5", ("x",), 3 * (3 * 32_768)),
    # The same for each of 3 layers, in a loop within the loop.
    (
        "gather_layers_in_microbatches.tpu",
        "gathered-every-trip",
        "all-gather.2",
        ("x",),
        3 * 3 * (3 * 32_768),
    ),
    # f32[1024,256] over 4: an all-reduce sends 2 · 3/4 MiB, an all-gather or a reduce-scatter half of it.
    ("reduce_padded_shard.tpu", "gathered-by-reduction", "psum.7", ("x",), 3 * 262_144),
    ("reduce_then_slice.tpu", "reduced-then-sliced", "psum.7", ("x",), 3 * 262_144),
    ("reduce_then_slice.cpu", "reduced-then-sliced", "psum.7", ("x",), 3 * 262_144),
    # The same of XLA:GPU, which keeps f32: twice the bytes where libtpu narrows.
    ("gather_then_convert.gpu", "gathered-wide", "all_gather.3.2", ("x", "y"), 7 * 131_072 // 2),
    ("gather_twice.gpu", "gathered-twice", "all-gather-start.1", ("x",), 3 * 65_536),
    ("gather_then_slice.gpu", "gathered-then-sliced", "all-gather-start", ("x", "y"), 7 * 131_072 - 65_536),
    ("gather_in_loop.gpu", "gathered-every-trip", "all-gather-start", ("x",), 3 * (3 * 65_536)),
    (
        "gather_layers_in_microbatches.gpu",
        "gathered-every-trip",
        "all_gather.2.2",
        ("x",),
        3 * 3 * (3 * 65_536),
    ),
    # f32[64,256] and f32[64,128] shards over 4 in one gather, on 4 trips.
    (
        "gather_two_in_loop.gpu",
        "gathered-every-trip",
        "all-gather-start",
        ("x",),
        3 * (3 * (65_536 + 32_768)),
    ),
    ("reduce_then_slice.gpu", "reduced-then-sliced", "all-reduce-start", ("x",), 3 * 262_144),
    # f32[256,256] over 4 before a loop, each of whose 4 trips keeps 8 rows of 1 KiB.
    ("gather_then_slice_in_loop.cpu", "gathered-then-sliced", "all_gather.3", ("x",), IN_LOOP),
    ("gather_then_slice_in_loop.gpu", "gathered-then-sliced", "all-gather-start", ("x",), IN_LOOP),
    ("gather_then_slice_in_loop.tpu", "gathered-then-sliced", "all_gather.3", ("x",), IN_LOOP),
    # XLA:CPU widens bf16[2048,2048] to f32 and back: 12 MiB sent on each of 8 trips for 2 MiB that are kept.
    ("gather_in_chain.cpu", "gathered-then-sliced", "all_gather.4", ("x",), 8 * (12 - 2) * 2**20),
    # bf16[2048,2048] over 4 on each of 8 trips, by a chain of fusions: 6 MiB sent for the 1 MiB that is kept.
    ("gather_in_chain.tpu", "gathered-then-sliced", "all-gather.8", ("x",), 8 * (6 - 1) * 2**20),
]
NOTHING = [
    "convert_then_gather.cpu",  # XLA:CPU widens it by itself
    "gather_over_two_axes.tpu",  # other groups, another result
    "gather_then_slice_most.tpu",  # 3/4 of the rows are kept
    "gather_scanned_layers.tpu",  # another layer on each trip
    "reduce_updated_array.tpu",  # a shard written into something else than zeros
    "reduce_then_use_all.tpu",  # the sum is also a result
    "reduce_then_slice_over_other_axis.tpu",  # devices of one group keep the same half
    "gather_in_loop.cpu",  # XLA:CPU gathers before the loop
    "gather_ahead.tpu",  # libtpu narrows before it gathers
    "gather_ahead_and_keep.cpu",  # one trip converts, but the loop gives the whole back in f32
    "gather_ahead_and_keep.gpu",
    "gather_ahead_and_keep.tpu",
    "gather_then_slice_all_in_loop.cpu",  # a quarter on each of 4 trips
    "gather_then_slice_all_in_loop.gpu",
    "gather_then_slice_all_in_loop.tpu",
    "gather_in_chain_whole.tpu",  # the last fusion of the chain gives all of it to a product
]
# Of each rule one of these.
NEARLY = {
    "gathered-wide": "convert_then_gather.cpu",
    "gathered-twice": "gather_over_two_axes.tpu",
    "gathered-then-sliced": "gather_then_slice_most.tpu",
    "gathered-every-trip": "gather_scanned_layers.tpu",
    "gathered-by-reduction": "reduce_updated_array.tpu",
    "reduced-then-sliced": "reduce_then_use_all.tpu",
}
# f32[64,256] over 4, of which bf16 is half: gathered once before the loop and on 3 trips for the next one.
AHEAD = {
    "gather_ahead.cpu": {"all_gather.6": 3 * 32_768, "all_gather.4": 3 * (3 * 32_768)},
    "gather_ahead.gpu": {"all-gather-start.1": 3 * 32_768, "all-gather-start": 3 * (3 * 32_768)},
}


def audit_sources(
    source: Source | Sequence[Source], axes: dict[str, int] | None = None
) -> tuple[Analysis, tuple[Finding, ...]]:
    """As `shardlab analyze --audit` puts them together."""
    parts = tuple(attribute(source, axes))
    return merge([part.analysis for part in parts]), audit_parts(parts)


def audited(name: str) -> tuple[Finding, ...]:
    return audit_sources(GOLDEN / f"{name}.hlo", axes=MESH)[1]


@pytest.mark.parametrize("name", AHEAD)
def test_what_a_trip_gathers_for_the_next_is_followed_through_the_loops_state(name: str) -> None:
    found = audited(name)
    assert {one.rule for one in found} == {"gathered-wide"}
    assert {one.instruction: one.wire_bytes for one in found} == {
        instruction: (saved, saved) for instruction, saved in AHEAD[name].items()
    }


@pytest.mark.parametrize(("name", "rule", "instruction", "axes", "saved"), FOUND, ids=[f[0] for f in FOUND])
def test_found(name: str, rule: str, instruction: str, axes: tuple[str, ...], saved: int) -> None:
    (finding,) = audited(name)
    assert (finding.rule, finding.instruction, finding.axes) == (rule, instruction, axes)
    assert finding.wire_bytes == (saved, saved)
    assert finding.source.startswith("make.py:")
    assert finding.evidence.endswith(".")
    assert finding.remedy.endswith(".")


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_found(name: str) -> None:
    assert audited(name) == ()
    assert analyze(GOLDEN / f"{name}.hlo", axes=MESH).collectives  # there was something to look at


def test_every_program_of_the_folder_is_expected() -> None:
    expected = {name for name, *_ in FOUND} | set(NOTHING) | set(AHEAD)
    assert {path.name.removesuffix(".hlo") for path in GOLDEN.glob("*.hlo")} - {
        "reshard_by_replication.cpu"
    } == expected


def rematerialized(log: str) -> tuple[Finding, ...]:
    text = (GOLDEN / "reshard_by_replication.cpu.hlo").read_text(encoding="utf-8")
    program = Program(
        name="p", backend="cpu", hlo_text=text, num_devices=8, mesh=MESH, warnings=warnings(log)
    )
    (part,) = attribute(program)
    return tuple(finding for finding in audit(part) if finding.rule == "rematerialized")


def test_a_warned_rematerialization_is_joined_to_its_gathers() -> None:
    """f32[4,16,1] shards gathered over x (3 · 256 bytes), then f32[4,16,4] over y (1024)."""
    (finding,) = rematerialized((GOLDEN / "reshard_by_replication.cpu.log").read_text(encoding="utf-8"))
    assert finding.wire_bytes == (3 * 256 + 1024, 3 * 256 + 1024)
    assert (finding.instruction, finding.axes) == ("all-gather", ("x",))
    assert "from sharding {mesh['x'=4,'y'=2], [{'y'}, {}, {'x'}]} to" in finding.evidence
    assert "with all-gather, all-gather.1" in finding.evidence


def test_a_warning_that_names_nothing_of_the_program_has_no_bytes() -> None:
    log = (GOLDEN / "reshard_by_replication.cpu.log").read_text(encoding="utf-8")
    (finding,) = rematerialized(log.replace('op_name="', 'op_name="other/'))
    assert finding.wire_bytes is None
    assert finding_json(finding)["wire_bytes"] is None


def test_without_the_warning_nothing_is_said_to_be_rematerialized() -> None:
    assert rematerialized("W1123 all is well\n") == ()


def test_the_json_of_a_finding() -> None:
    (finding,) = audited("gather_then_convert.cpu")
    assert finding_json(finding) == {
        "rule": "gathered-wide",
        "instruction": "all_gather.3",
        "axes": ["x", "y"],
        "wire_bytes": [458_752, 458_752],
        "source": finding.source,
        "evidence": finding.evidence,
        "remedy": finding.remedy,
    }


def test_several_modules_are_told_apart() -> None:
    paths = [GOLDEN / "gather_then_convert.cpu.hlo", GOLDEN / "gather_then_slice.tpu.hlo"]
    analysis, findings = audit_sources(paths, axes=MESH)
    assert len(analysis.modules) == 2
    assert [(one.rule, one.module) for one in findings] == [
        ("gathered-wide", "jit_body"),
        ("gathered-then-sliced", "jit_body"),
    ]
    assert finding_json(findings[0])["module"] == "jit_body"


def module_of(body: str, rest: str = "") -> str:
    entry = f"ENTRY main {{\n  p = f32[64,256]{{1,0}} parameter(0)\n{body}}}\n"
    return f"HloModule m, num_partitions=4\n\n{rest}\n{entry}"


GROUPS = "channel_id=1, replica_groups={{0,1,2,3}}, use_global_device_ids=true"
ADD = "add { a = f32[] parameter(0)\n  b = f32[] parameter(1)\n  ROOT c = f32[] add(a, b) }\n"


def rules_of(text: str) -> list[str]:
    return [finding.rule for finding in audit_sources(text)[1]]


CONVERT = 'bf16[256,256]{1,0} convert(d), metadata={op_name="jit(f)/convert_element_type"}'
SLICE = "ROOT r = f32[ROWS,256] slice(d), slice={[0:ROWS], [0:256]}"
BOTH = f"h = {CONVERT}\n  ROOT r = (bf16[256,256]{{1,0}}, f32[256,256]{{1,0}}) tuple(h, d)"


# Written by hand: the form of GPU text, where start and done stand apart.
@pytest.mark.parametrize(
    ("used", "rules"),
    [
        pytest.param(f"ROOT r = {CONVERT}", ["gathered-wide"], id="converted"),
        pytest.param(f"ROOT r = {CONVERT.replace('bf16', 's32')}", [], id="to integers"),
        pytest.param(f"ROOT r = {CONVERT.replace('bf16', 'f64')}", [], id="to a wider type"),
        pytest.param(BOTH, [], id="also a result"),
        pytest.param(SLICE.replace("ROWS", "127"), ["gathered-then-sliced"], id="sliced"),
        pytest.param(SLICE.replace("ROWS", "128"), [], id="half is kept"),
    ],
)  # fmt: skip
def test_asynchronous_gathers(used: str, rules: list[str]) -> None:
    start = f"  s = (f32[64,256], f32[256,256]) all-gather-start(p), dimensions={{0}}, {GROUPS}\n"
    config = ', backend_config={"collective_backend_config":{}}'
    done = f"  d = f32[256,256]{{1,0}} all-gather-done(s){config}\n  {used}\n"
    if "metadata" not in used:
        done = done.replace("convert(d)", 'convert(d), metadata={op_name="jit(f)/convert_element_type"}')
    assert rules_of(module_of(start + done)) == rules


def test_a_gather_in_an_async_wrapper_is_followed_to_its_done() -> None:
    wrapped = (
        "wrapped { q = f32[64,256]{1,0} parameter(0)\n"
        f"  ROOT g = f32[256,256]{{1,0}} all-gather(q), dimensions={{0}}, {GROUPS} }}\n"
    )
    start = "  s = ((f32[64,256]), f32[256,256], u32[]) async-start(p), calls=wrapped\n"
    done = f"  d = f32[256,256]{{1,0}} async-done(s)\n  ROOT r = {CONVERT}\n"
    (finding,) = audit_sources(module_of(start + done, wrapped))[1]
    assert (finding.rule, finding.instruction) == ("gathered-wide", "s")
    also = done.replace("ROOT r", "r") + "  ROOT o = f32[256,256]{1,0} tanh(d)\n"
    assert rules_of(module_of(start + also, wrapped)) == []


HEAD = "slice={[0:8], [0:256]}"


# Written by hand: the ways in which libtpu moves a part to other memory meanwhile.
@pytest.mark.parametrize(
    ("start", "done"),
    [
        pytest.param("async-start(g), calls=part", "async-done(a)", id="wrapped"),
        pytest.param(f"slice-start(g), {HEAD}", "slice-done(a)", id="in short"),
    ],
)
def test_a_slice_in_an_async_pair_is_a_slice(start: str, done: str) -> None:
    part = f"part {{ q = f32[256,256] parameter(0)\n  ROOT k = f32[8,256] slice(q), {HEAD} }}\n"
    body = (
        f"  g = f32[256,256]{{1,0}} all-gather(p), dimensions={{0}}, {GROUPS}\n"
        f"  a = ((f32[256,256]), f32[8,256], u32[]) {start}\n  ROOT r = f32[8,256] {done}\n"
    )
    (finding,) = audit_sources(module_of(body, part))[1]
    kept = 8 * 256 * 4
    assert (finding.rule, finding.wire_bytes) == (
        "gathered-then-sliced",
        (3 * 65_536 - kept, 3 * 65_536 - kept),
    )


def test_a_combined_gather_is_judged_array_by_array() -> None:
    gather = (
        "  q = f32[32,256]{1,0} parameter(1)\n"
        f"  g = (f32[256,256], f32[128,256]) all-gather(p, q), dimensions={{0}}, {GROUPS}\n"
        "  d = f32[256,256] get-tuple-element(g), index=0\n  e = f32[128,256] get-tuple-element(g), index=1\n"
        f"  c = {CONVERT}\n  ROOT r = (bf16[256,256], f32[128,256]) tuple(c, e)\n"
    )
    (finding,) = audit_sources(module_of(gather))[1]
    assert finding.wire_bytes == (3 * 65_536 // 2, 3 * 65_536 // 2)  # half of what f32[64,256] over 4 sends


def test_the_arrays_of_a_combined_gather_are_one_finding() -> None:
    gather = (
        "  q = f32[32,256]{1,0} parameter(1)\n"
        f"  g = (f32[256,256], f32[128,256]) all-gather(p, q), dimensions={{0}}, {GROUPS}\n"
        "  d = f32[256,256] get-tuple-element(g), index=0\n  e = f32[128,256] get-tuple-element(g), index=1\n"
        f'  c = {CONVERT}\n  f = bf16[128,256] convert(e), metadata={{op_name="b"}}\n'
        "  ROOT r = (bf16[256,256], bf16[128,256]) tuple(c, f)\n"
    )
    (finding,) = audit_sources(module_of(gather))[1]
    half = 3 * 65_536 // 2 + 3 * 32_768 // 2  # of f32[64,256] and of f32[32,256] over 4
    assert finding.wire_bytes == (half, half)
    assert finding.evidence.endswith("So with 1 more of its arrays.")


def rules_on(backend: str, text: str) -> list[str]:
    program = Program(name="p", backend=backend, hlo_text=text, num_devices=4)
    return [finding.rule for finding in audit_sources(program)[1]]


BARE = CONVERT.partition(", metadata")[0]


# Written by hand: what XLA:CPU may leave of a widened collective when only one of its two converts is near.
@pytest.mark.parametrize(
    ("backend", "before", "after", "rules"),
    [
        pytest.param("cpu", "copy(p)", CONVERT, ["gathered-wide"], id="of the source"),
        pytest.param("cpu", "copy(p)", BARE, [], id="XLA's own convert after"),
        pytest.param("cpu", "convert(h)", CONVERT, [], id="XLA's own convert before"),
        pytest.param("tpu", "copy(p)", BARE, ["gathered-wide"], id="no other backend widens"),
    ],
)
def test_what_the_cpu_compiler_widens_is_no_finding(
    backend: str, before: str, after: str, rules: list[str]
) -> None:
    body = (
        f"  h = bf16[64,256]{{1,0}} convert(p)\n  w = f32[64,256]{{1,0}} {before}\n"
        f"  d = f32[256,256]{{1,0}} all-gather(w), dimensions={{0}}, {GROUPS}\n  ROOT r = {after}\n"
    )
    assert rules_on(backend, module_of(body)) == rules


@pytest.mark.parametrize(
    ("first", "second", "rules"),
    [
        pytest.param("jvp(l)/a", "jvp(l)/b", ["gathered-twice"], id="forward again"),
        pytest.param("jvp(l)/a", "transpose(jvp(l))/a", [], id="backward"),
        pytest.param("transpose(jvp(l))/a", "transpose(jvp(l))/b", ["gathered-twice"], id="backward again"),
        pytest.param("transpose(jvp(l))/a", "transpose(jvp(l))/rematted_computation/a", [], id="recomputed"),
    ],
)
def test_a_gather_is_twice_only_within_a_phase(first: str, second: str, rules: list[str]) -> None:
    gather = f"f32[256,256]{{1,0}} all-gather(p), dimensions={{0}}, {GROUPS}"
    body = (
        f'  g = {gather}, metadata={{op_name="jit(f)/{first}"}}\n'
        f'  h = {gather}, metadata={{op_name="jit(f)/{second}"}}\n'
        "  ROOT r = f32[256,256]{1,0} add(g, h)\n"
    )
    assert rules_of(module_of(body)) == rules


TABLE = """\
  i = u32[] partition-id()
  t = s32[4]{0} constant({%s})
  e = s32[1]{0} dynamic-slice(t, i), dynamic_slice_sizes={1}
  o = s32[] reshape(e)
  z = s32[] constant(0)
"""


@pytest.mark.parametrize(
    ("table", "rules"),
    [
        pytest.param("0,16,32,48", ["reduced-then-sliced"], id="in order"),
        pytest.param("48,0,32,16", ["reduced-then-sliced"], id="in another order"),
        pytest.param("0,16,32,32", [], id="two keep the same part"),
        pytest.param("0,16,32,40", [], id="parts overlap"),
        pytest.param("0,16,32,99", ["reduced-then-sliced"], id="clamped to the last part"),
    ],
)
def test_the_part_that_a_device_keeps_is_looked_up(table: str, rules: list[str]) -> None:
    reduce = f"  g = f32[64,256]{{1,0}} all-reduce(p), {GROUPS}, to_apply=add\n"
    keep = "  ROOT r = f32[16,256]{1,0} dynamic-slice(g, o, z), dynamic_slice_sizes={16,256}\n"
    assert rules_of(module_of(reduce + TABLE % table + keep, ADD)) == rules


@pytest.mark.parametrize(
    ("zero", "table", "rules"),
    [
        pytest.param("0", "0,64,128,192", ["gathered-by-reduction"], id="zeros"),
        pytest.param("-0.0", "192,128,64,0", ["gathered-by-reduction"], id="negative zeros"),
        pytest.param("1", "0,64,128,192", [], id="ones"),
        pytest.param("nan", "0,64,128,192", [], id="not a number"),
        pytest.param("0", "0,0,128,192", [], id="at the same place"),
    ],
)
def test_padded_shards(zero: str, table: str, rules: list[str]) -> None:
    pad = (
        f"  c = f32[] constant({zero})\n  b = f32[256,256]{{1,0}} broadcast(c), dimensions={{}}\n"
        "  u = f32[256,256]{1,0} dynamic-update-slice(b, p, o, z)\n"
        f"  ROOT g = f32[256,256]{{1,0}} all-reduce(u), {GROUPS}, to_apply=add\n"
    )
    assert rules_of(module_of(TABLE % table + pad, ADD)) == rules


def test_unknown_trips_of_a_loop_say_nothing() -> None:
    text = (GOLDEN / "gather_in_loop.tpu.hlo").read_text(encoding="utf-8")
    assert rules_of(text) == ["gathered-every-trip"]
    unknown = text.replace(
        "s32[]{:T(128)} constant(4)", 's32[]{:T(128)} custom-call(), custom_call_target="x"'
    )
    assert unknown != text
    assert rules_of(unknown) == []


def test_the_loop_is_named_with_its_line() -> None:
    (finding,) = audited("gather_in_loop.gpu")
    assert "on each of 4 trips of while.9 (make.py:134), which does not change them" in finding.evidence


LOOP = """\
body {
  s = (f32[256,256], s32[]) parameter(0)
  w = f32[256,256] get-tuple-element(s), index=0
  i = s32[] get-tuple-element(s), index=1
  one = s32[] constant(1)
  j = s32[] add(i, one)
  USED
  ROOT t = (f32[256,256], s32[]) tuple(CARRIED, j)
}
cond {
  s = (f32[256,256], s32[]) parameter(0)
  i = s32[] get-tuple-element(s), index=1
  n = s32[] constant(4)
  ROOT l = pred[] compare(i, n), direction=LT
}
"""
STATE = f"""\
  g = f32[256,256]{{1,0}} all-gather(p), dimensions={{0}}, {GROUPS}
  z = s32[] constant(0)
  t = (f32[256,256], s32[]) tuple(g, z)
  l = (f32[256,256], s32[]) while(t), condition=cond, body=body
  ROOT r = RESULT
"""
LITTLE = "k = f32[8,256] slice(w), slice={[0:8], [0:256]}"
TRIPS = "s32[] get-tuple-element(l), index=1"
WHOLE = "f32[256,256] get-tuple-element(l), index=0"


# Written by hand: a gathered array in a loop's state, of which each of 4 trips takes 8 rows of 256.
@pytest.mark.parametrize(
    ("used", "carried", "result", "rules"),
    [
        pytest.param(LITTLE, "w", TRIPS, ["gathered-then-sliced"], id="sliced in the body"),
        pytest.param(LITTLE, "w", WHOLE, [], id="and a result of the loop"),
        pytest.param(
            f"{LITTLE}\n  h = f32[256,256] tanh(w)", "w", TRIPS, [], id="and used whole in the body"
        ),
        pytest.param(
            f"{LITTLE}\n  c = f32[256,256] copy(w)",
            "c",
            TRIPS,
            ["gathered-then-sliced"],
            id="copied on each trip",
        ),
    ],
)
def test_the_state_of_a_loop_is_followed(used: str, carried: str, result: str, rules: list[str]) -> None:
    loop = LOOP.replace("USED", used).replace("CARRIED", carried)
    assert rules_of(module_of(STATE.replace("RESULT", result), loop)) == rules


def test_instructions_in_a_circle_end() -> None:
    gather = f"  g = f32[256,256]{{1,0}} all-gather(t), dimensions={{0}}, {GROUPS}\n"
    circle = "  t = f32[64,256]{1,0} copy(t)\n  u = (f32[256,256]) tuple(g)\n  v = (f32[256,256]) tuple(v)\n"
    assert rules_of(module_of(circle + gather + "  ROOT r = f32[] constant(0)\n")) == []


def test_every_rule_is_found_somewhere() -> None:
    found = {rule for _, rule, *_ in FOUND} | ELSEWHERE
    assert found == {rule.__name__.replace("_", "-") for rule in RULES}


def test_every_rule_has_a_program_that_nearly_has_what_it_looks_for() -> None:
    assert NEARLY.keys() | ELSEWHERE == {rule.__name__.replace("_", "-") for rule in RULES}
    assert set(NEARLY.values()) <= set(NOTHING)
