"""The reader: print styles agree, cut or broken text is an error that points, depth costs no stack."""

from __future__ import annotations

import gzip
import random
import re
import time

import pytest
from hlo.described import GOLDEN, case_text
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlab.errors import ParseError
from shardlab.hlo.attributes import called_computations, metadata
from shardlab.hlo.groups import parse_replica_groups
from shardlab.hlo.lookup import of_opcodes
from shardlab.hlo.module import Module
from shardlab.hlo.reader import parse, parse_with_care
from shardlab.hlo.shape import shape_bytes

PRINTED = GOLDEN / "printed"
TEXTS = sorted([*GOLDEN.glob("*.hlo"), *PRINTED.glob("*.hlo"), *PRINTED.glob("*.txt")])
COMPRESSED = sorted([*PRINTED.glob("*.hlo.gz"), *PRINTED.glob("*.txt.gz")])
EVERY_TEXT = [pytest.param(path, id=path.name.removesuffix(".gz")) for path in [*TEXTS, *COMPRESSED]]
STRINGS = re.compile(r'"(?:[^"\\]|\\.)*"' + r"|'[^']*'", re.DOTALL)

ADD = "%add (x: f32[], y: f32[]) -> f32[] {\n  %x = f32[] parameter(0)\n  %y = f32[] parameter(1)\n"
ADD += "  ROOT %s = f32[] add(%x, %y)\n}\n"
ENTRY = "ENTRY %main (p: f32[8]) -> f32[8] {\n  %p = f32[8]{0} parameter(0)\n"
ENTRY += "  ROOT %n = f32[8]{0} negate(%p)\n}\n"
HEADER = "HloModule jit_f, entry_computation_layout={(f32[8]{0})->f32[8]{0}}, num_partitions=8\n\n"


def read(path) -> str:  # type: ignore[no-untyped-def]
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()


def everything(text: str) -> tuple[Module, ...]:
    """Parse, and read every instruction and attribute, so that nothing is left for later."""
    modules = parse(text)
    for module in modules:
        for computation in module.computations.values():
            for instruction in computation.instructions.values():
                dict(instruction.attributes)
    return modules


def facts(module: Module) -> list[tuple[object, ...]]:
    """What every print style keeps."""
    return [
        (
            name,
            i.name,
            i.opcode,
            shape_bytes(i.shape),
            [op.name for op in i.operands],
            called_computations(i),
            i.is_root,
        )
        for name, computation in sorted(module.computations.items())
        for i in computation.instructions.values()
    ]


@pytest.mark.parametrize("path", EVERY_TEXT)
def test_fast_and_careful_reading_agree(path) -> None:  # type: ignore[no-untyped-def]
    assert parse(read(path)) == parse_with_care(read(path))


@pytest.mark.parametrize(
    "style", ["print_no_layouts", "print_no_percent", "print_operand_shapes", "print_short_parsable"]
)
def test_print_styles_hold_the_same_program(style: str) -> None:
    (reference,) = parse(read(PRINTED / "shard_map_ops.jax0.12.hlo"))
    (module,) = parse(read(PRINTED / f"{style}.hlo"))
    assert facts(module) == facts(reference)
    assert module.num_partitions == reference.num_partitions == 8


def test_both_jax_releases_print_the_same_groups() -> None:
    """The same program from 0.10.2 (V1 groups) and 0.12 (V3)."""
    collectives = ["all-reduce", "all-gather", "reduce-scatter", "all-to-all"]
    found = []
    for release in ("0.10.2", "0.12"):
        (module,) = parse(read(PRINTED / f"shard_map_ops.jax{release}.hlo"))
        groups = [
            (i.opcode, sorted(parse_replica_groups(i.attributes["replica_groups"]).groups))
            for computation in module.computations.values()
            for i in of_opcodes(computation.instructions, collectives)
        ]
        found.append(groups)
    assert len(found[0]) == 6
    assert found[0] == found[1]


def test_stack_frames_lead_to_source_lines() -> None:
    (module,) = parse(read(PRINTED / "hostile_op_name.hlo"))
    ar = module.computations[module.entry].instructions["psum.7"]
    frame = module.stack_frames[metadata(ar).stack_frame_id]
    assert metadata(ar).op_name == 'jit(g)/we{ird"}, channel_id=7, to_apply=%x/shard_map/psum'
    assert (frame.file, frame.line, frame.function, frame.parent) == (
        "train.py",
        41,
        "g.<locals>.<lambda>",
        3,
    )


@pytest.mark.parametrize("path", EVERY_TEXT)
def test_text_cut_anywhere_is_an_error_that_points(path) -> None:  # type: ignore[no-untyped-def]
    text = read(path)
    whole = len(text.split("} // done")[0].rstrip())
    inside = [match.end() for match in re.finditer(r"\n\}", text[:whole])][:-1]
    chosen = random.Random(path.name)
    joint = text.find("\n\nHloModule")  # cut between two joined modules, the first one is whole
    for cut in [
        *(chosen.randrange(1, whole) for _ in range(60)),
        *chosen.sample(inside, min(10, len(inside))),
        whole - 1,
    ]:
        if joint <= cut <= joint + 2 and joint >= 0:
            continue
        with pytest.raises(ParseError) as caught:
            everything(text[:cut])
        lines = text[:cut].split("\n")
        assert 1 <= caught.value.line <= len(lines)
        assert 1 <= caught.value.column <= len(lines[caught.value.line - 1]) + 1


@pytest.mark.parametrize("path", EVERY_TEXT)
def test_a_bracket_too_few_or_too_many_is_an_error(path) -> None:  # type: ignore[no-untyped-def]
    text = read(path)
    masked = STRINGS.sub(
        lambda match: "." * len(match.group()),
        re.sub(r"//[^\n]*|/\*.*?\*/", lambda m: "." * len(m.group()), text, flags=re.DOTALL),
    )
    kinds = "(){}" if path.name.startswith("a12") else "(){}[]"  # a12: a frontend value need not be JSON
    places = [at for at, char in enumerate(masked) if char in kinds]
    chosen = random.Random(path.name)
    for at in chosen.sample(places, min(25, len(places))):
        with pytest.raises(ParseError):
            everything(text[:at] + text[at + 1 :])
    # In a dict braces are all that must balance: it need not be JSON.
    more = "{}" if "backend_config={" in text or "frontend_attributes={" in text else "(){}[]"
    for at in chosen.sample(places, min(15, len(places))):
        with pytest.raises(ParseError):
            everything(text[:at] + chosen.choice(more) + text[at:])


ERRORS = [
    ("", 1, 1, "empty"),
    (" \n\n", 1, 1, "empty: no HLO"),
    ("HloModule jit_f, num_partitions=8\n", 2, 1, "before its first computation"),
    ("HloModule", 1, 10, "expected '{' to open"),
    (HEADER + ADD, 8, 1, "before the ENTRY computation"),
    (HEADER + "%a {\n}\n" + ENTRY, 4, 1, "no instruction"),
    (HEADER + ENTRY + ENTRY, 7, 1, "second computation"),
    (HEADER + ENTRY + ENTRY.replace("%main", "%b"), 1, 1, "marked ENTRY"),
    (HEADER + ENTRY.replace("%n =", "%p ="), 5, 1, "second instruction"),
    (HEADER + ENTRY.replace("negate(%p)", "negate(%p"), 6, 1, "does not close '('"),
    (HEADER + ENTRY.replace("negate(%p)", "negate((%p)").rstrip("}\n"), 5, 29, "never closed"),
    (HEADER + ENTRY.replace("negate(%p)", "negate(%p))"), 5, 33, "expected an instruction"),
    (HEADER + ENTRY.replace("negate(%p)", 'negate(%p), metadata={op_name="x}'), 5, 53, "string is never"),
    (HEADER + ENTRY.replace("negate(%p)", "negate(%p), metadata"), 5, 35, "expected an attribute"),
    (HEADER + ENTRY.replace("negate(%p)", "negate(%p), index="), 6, 1, "has no value"),
    (HEADER + ENTRY.replace("negate(%p)", "negate(%p), index=1, index=2"), 5, 44, "index is given twice"),
    (HEADER + ENTRY.replace("f32[8]{0} negate", "f32[8,x]{0} negate"), 5, 13, "expected an array"),
    (HEADER + ENTRY.replace("negate(%p)", "negate(negate(%p))"), 5, 30, "cannot read the operand"),
    (HEADER + ENTRY.replace("}\n", "/* }\n"), 6, 1, "comment is never closed"),
    (HEADER + ENTRY.rstrip("}\n"), 5, 33, "ends inside computation main, which line 3 opens"),
    (HEADER.replace("=8", "=0") + ENTRY, 1, 1, "not a positive number"),
    (HEADER + "just some words\n", 3, 6, "expected '{' to open computation just"),
    (HEADER + ENTRY + "}\n", 7, 1, "expected a computation"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "line", "column", "words"), ERRORS, ids=[error[3] for error in ERRORS])
def test_errors_point(text: str, line: int, column: int, words: str) -> None:
    with pytest.raises(ParseError, match=re.escape(words)) as caught:
        everything(text)
    assert (caught.value.line, caught.value.column) == (line, column)


def test_no_entry_mark_in_handwritten_text_means_the_last_computation() -> None:
    (module,) = parse("HloModule hand\n" + ADD + ENTRY.removeprefix("ENTRY "))
    assert module.entry == "main"


def test_text_without_a_module_line() -> None:
    (module,) = parse(ADD + ENTRY)
    assert (module.name, module.entry) == ("", "main")


def test_a_single_instruction_is_a_program() -> None:
    (module,) = parse("ROOT %ar = f32[8]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add")
    computation = module.computations[module.entry]
    assert computation.root == "ar"
    assert computation.instructions["ar"].attributes["replica_groups"] == "{{0,1}}"


def test_last_instruction_is_the_root_without_a_mark() -> None:
    (module,) = parse(HEADER + ENTRY.replace("ROOT ", ""))
    assert module.computations["main"].root == "n"


@pytest.mark.parametrize(
    "result", ["f32[8]{0}", "f32[]", "(f32[8]{0}, f32[])", "f32[8] {0}", "f32[]{:T(128)}", "b(f32[8]{0})"]
)
def test_layout_after_the_result_is_not_the_body(result: str) -> None:
    (module,) = parse(f"HloModule m\nENTRY e (p: f32[8]) -> {result} {{ p = f32[8] parameter(0) }}")
    assert list(module.computations["e"].instructions) == ["p"]


def test_unknown_opcodes_and_attributes_are_kept() -> None:
    (module,) = parse(
        HEADER
        + ENTRY.replace("negate(%p)", "warp-drive(%p), factor=9, plan={a={b},c=[1}, x=y".replace("[1", "1"))
    )
    instruction = module.computations["main"].instructions["n"]
    assert instruction.opcode == "warp-drive"
    assert dict(instruction.attributes) == {"factor": "9", "plan": "{a={b},c=1}", "x": "y"}


ATTRIBUTE_TEXTS = {
    "calls": "%a, %b",
    "replica_groups": "mesh['x'=2,'y'=4], device_ids=(0,2,4,6,1,3,5,7) {'y'}",
    "sharding": "{mesh['a, }'=2,'b'=4], [{'a, }'}, {'b':(2)2}], replicated={}}",
    "outfeed_shape": "(f32[3]{0}, pred[])",
    "output_to_operand_aliasing": "{{1}: (0, {}), {2,0}: (0, {2,0})}",
    "padding": "0_64x0_0",
    "dim_labels": "bf_io->bf",
    "slice": "{[0:128], [0:2048]}",
    "epsilon": "-1.5e-05",
    "custom_call_target": '"a, b={\\""',
    "backend_config": '{"a":"}","b":[{"c":1}]}',
}


@given(st.permutations(sorted(ATTRIBUTE_TEXTS)))
def test_attributes_in_any_order(order: list[str]) -> None:
    tail = "".join(f", {name}={ATTRIBUTE_TEXTS[name]}" for name in order)
    (module,) = everything(HEADER + ENTRY.replace("negate(%p)", f"negate(%p){tail}"))
    assert dict(module.computations["main"].instructions["n"].attributes) == {
        name: ATTRIBUTE_TEXTS[name] for name in order
    }


def test_deeply_nested_tuples() -> None:
    depth = 5000
    shape = "(" * depth + "f32[8]{0}" + ")" * depth
    (module,) = parse(HEADER + ENTRY.replace("f32[8]{0} negate", f"{shape} negate"))
    assert shape_bytes(module.computations["main"].instructions["n"].shape) == 32


def test_deeply_nested_dicts() -> None:
    value = "{" * 5000 + "}" * 5000
    (module,) = parse(HEADER + ENTRY.replace("negate(%p)", f"negate(%p), backend_config={value}"))
    assert module.computations["main"].instructions["n"].attributes["backend_config"] == value


def test_call_chain_of_five_thousand() -> None:
    parts = ["%c0 (p: f32[8]) -> f32[8] {\n  ROOT %p = f32[8]{0} parameter(0)\n}\n"]
    parts += [
        f"%c{i} (p: f32[8]) -> f32[8] {{\n  %p = f32[8]{{0}} parameter(0)\n"
        f"  ROOT %r = f32[8]{{0}} call(%p), to_apply=%c{i - 1}\n}}\n"
        for i in range(1, 5000)
    ]
    (module,) = parse("HloModule chain\n" + "".join(parts))
    assert (module.entry, len(module.computations)) == ("c4999", 5000)


@pytest.mark.parametrize(
    "name",
    [
        "x\n}\n\nENTRY %evil (p: f32[8]) -> f32[8] {\n  %q = f32[8]{0} all-reduce(%p), to_apply=%add\n",
        "]\n  %q = f32[8]{0} all-reduce(%p), to_apply=%add\n[",
        "'] {'x'}".replace("'", '"') + ", channel_id=9",
    ],
    ids=["computation", "instruction", "attribute"],
)
def test_names_may_look_like_structure(name: str) -> None:
    groups = f"mesh['{name}'=8] {{'{name}'}}"
    attributes = f"channel_id=1, replica_groups={groups}, to_apply=%add"
    (module,) = everything(HEADER + ADD + ENTRY.replace("negate(%p)", f"all-reduce(%p), {attributes}"))
    assert list(module.computations) == ["add", "main"]
    assert list(module.computations["main"].instructions) == ["p", "n"]
    found = module.computations["main"].instructions["n"].attributes
    assert parse_replica_groups(found["replica_groups"]).mesh == ((name, 8),)
    assert found["channel_id"] == "1"


@pytest.mark.parametrize(
    "tail",
    [
        ", channel_id=2 replica_groups={{0,1}}",
        ', metadata={op_name="x}',
        ", plan=mesh['a'=2] {'a'}",
        ', frontend_attributes={a="b"}x=y',
        ", channel_id=2,",
        ", channel_id=",
        " channel_id=2",
        ", 7",
    ],
)
def test_garbage_between_attributes_is_seen_before_anything_is_asked_for(tail: str) -> None:
    with pytest.raises(ParseError) as caught:
        parse(HEADER + ENTRY.replace("negate(%p)", f"negate(%p){tail}"))
    assert caught.value.line in (5, 6)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(TEXTS[:60]), st.data())
def test_any_edit_is_read_or_refused(path, data: st.DataObject) -> None:  # type: ignore[no-untyped-def]
    text = case_text(path.stem)
    at = data.draw(st.integers(0, len(text)))
    length = data.draw(st.sampled_from([0, 1, 5, 50]))
    insert = data.draw(st.text("(){}[]\"'\\/*,=%# \n:<>x1-", max_size=4))
    try:
        everything(text[:at] + insert + text[at + length :])
    except ParseError as error:
        assert error.line >= 1
        assert error.column >= 1


def seconds(text: str) -> float:
    start = time.process_time()
    parse(text)
    return time.process_time() - start


def test_time_grows_with_the_text_and_not_faster() -> None:
    """Twelve times the lines, well under twelve squared of the time; each line lists 9,000 devices."""
    groups = "{" + ",".join(f"{{{2 * i},{2 * i + 1}}}" for i in range(4500)) + "}"
    line = "  %a{i} = f32[8]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%add\n"

    def module(count: int) -> str:
        lines = "".join(line.format(i=i, groups=groups) for i in range(count))
        return HEADER + ADD + ENTRY.replace("  ROOT", lines + "  ROOT")

    small, large = module(10), module(120)
    assert min(seconds(large) for _ in range(3)) < 40 * max(min(seconds(small) for _ in range(3)), 1e-3)
