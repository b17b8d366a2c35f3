"""Values of single attributes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardlab.errors import ParseError
from shardlab.hlo.attributes import (
    Metadata,
    backend_config,
    called_computations,
    channel_id,
    computation_names,
    config_int,
    config_value,
    frontend_attributes,
    known_trip_count,
    metadata,
)
from shardlab.hlo.module import Instruction, Shape
from shardlab.hlo.strings import escape, unescape


def having(**attributes: str) -> Instruction:
    return Instruction(name="i", opcode="op", shape=Shape("f32"), attributes=attributes)


@pytest.mark.parametrize(
    ("attributes", "names"),
    [
        ({}, ()),
        ({"to_apply": "%add"}, ("add",)),
        ({"to_apply": "add.1"}, ("add.1",)),
        ({"calls": "%a, %b"}, ("a", "b")),
        ({"condition": "%c", "body": "%b"}, ("b", "c")),
        ({"branch_computations": "{%b0, /*second*/ %b1}"}, ("b0", "b1")),
        ({"true_computation": "%t", "false_computation": "%f"}, ("t", "f")),
        ({"called_computations": "{}"}, ()),
    ],
)
def test_called_computations(attributes: dict[str, str], names: tuple[str, ...]) -> None:
    assert called_computations(having(**attributes)) == names


def test_one_attribute_of_several() -> None:
    loop = having(condition="%c", body="%b")
    assert computation_names(loop, "condition") == ("c",)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("{}", Metadata()),
        (
            '{op_name="a/b" source_file="x.py" source_line=7}',
            Metadata(op_name="a/b", source_file="x.py", source_line=7),
        ),
        ('{op_type="dot" stack_frame_id=3}', Metadata(op_type="dot", stack_frame_id=3)),
        (
            r'{op_name="stack_frame_id=9 \"}" stack_frame_id=2}',
            Metadata(op_name='stack_frame_id=9 "}', stack_frame_id=2),
        ),
        ('{profile_type={WINDOW} op_name="n" size_of_generated_code_in_bytes=1}', Metadata(op_name="n")),
        (
            '{op_name="n" profile_info={op_name="not this"} source_line=4}',
            Metadata(op_name="n", source_line=4),
        ),
        (r'{op_name="caf\303\251\n"}', Metadata(op_name="café\n")),
    ],
)
def test_metadata(raw: str, expected: Metadata) -> None:
    assert metadata(having(metadata=raw)) == expected


def test_no_metadata() -> None:
    assert metadata(having()) == Metadata()


@pytest.mark.parametrize(
    "raw",
    [
        '{"known_trip_count":{"n":"6"},"known_init_step":{"init":"0","step":"1"}}',
        '{"known_init_step":{"step":"1","init":"0"},"known_trip_count":{"n":6}}',
        r'"{\"known_trip_count\":{\"n\":\"6\"}}"',
    ],
)
def test_trip_count_in_every_print(raw: str) -> None:
    assert known_trip_count(having(backend_config=raw)) == 6


@pytest.mark.parametrize(
    "raw", [None, "{}", '{"known_trip_count":{}}', '{"known_trip_count":{"n":"many"}}', '{"n":"6"}']
)
def test_no_trip_count(raw: str | None) -> None:
    assert known_trip_count(having(**({"backend_config": raw} if raw else {}))) is None


def test_zero_trips_are_zero() -> None:
    assert known_trip_count(having(backend_config='{"known_trip_count":{"n":"0"}}')) == 0


@pytest.mark.parametrize("raw", ['{"n": [1, }', '{"n": ' + "[" * 100_000 + "}", '{"n"}'])
def test_damaged_config_is_an_error_and_not_an_absent_value(raw: str) -> None:
    with pytest.raises(ParseError, match="not JSON"):
        config_value(having(backend_config=raw), "n")


def test_config_that_is_no_json_has_no_members() -> None:
    pseudo = having(backend_config='{is_stable = true, order = "TOTAL"}')
    assert backend_config(pseudo) == {}
    assert config_value(pseudo, "is_stable") is None


def test_config_members() -> None:
    config = having(backend_config='{"a":{"b":[1],"c":"-3"}}')
    assert config_value(config, "a", "b") == [1]
    assert config_int(config, "a", "c") == -3
    assert config_value(config, "a", "z") is None
    assert config_value(config, "a", "b", "c") is None


@pytest.mark.parametrize(("raw", "expected"), [("5", 5), ("0", None), ("-1", None), ("x", None)])
def test_channel(raw: str, expected: int | None) -> None:
    assert channel_id(having(channel_id=raw)) == expected


VALUES = st.one_of(
    st.text(st.characters(blacklist_categories=["Cs"]), max_size=12).map(
        lambda text: (f'"{escape(text)}"', text)
    ),
    st.recursive(
        st.just({}), lambda inner: st.dictionaries(st.text('ab}{"', max_size=3), inner, max_size=2)
    ).map(lambda value: (json.dumps(value), json.dumps(value))),
)


@given(
    st.dictionaries(st.from_regex(r"[a-z_][a-z0-9_\-]{0,6}", fullmatch=True), VALUES, max_size=4),
    st.sampled_from([",", ", "]),
)
def test_frontend_attributes_read_back(items: dict[str, tuple[str, str]], comma: str) -> None:
    raw = "{" + comma.join(f"{key}={printed}" for key, (printed, _) in items.items()) + "}"
    assert frontend_attributes(having(frontend_attributes=raw)) == {
        key: value for key, (_, value) in items.items()
    }


@given(st.text(st.characters(blacklist_categories=["Cs"])))
def test_strings_read_back(text: str) -> None:
    assert unescape(f'"{escape(text)}"') == text


@pytest.mark.parametrize(
    ("printed", "value"),
    [
        (r'"a\"b"', 'a"b'),
        (r'"\\n"', r"\n"),
        (r'"\t\x41\101"', "\tAA"),
        (r'"\377"', "�"),
        ('"it\\\'s"', "it's"),
        ('""', ""),
    ],
)
def test_escapes(printed: str, value: str) -> None:
    assert unescape(printed) == value
