"""What may stand in machine and link files, and every mistake in one at once."""

from __future__ import annotations

from collections.abc import Mapping

from shardlab.errors import Problem
from shardlab.hardware.toml_file import KeyPath, Table, at, did_you_mean, quoted

TIERS = ("nvlink", "xgmi", "pcie", "infiniband", "ethernet", "ici", "dcn", "wan", "loopback")

# key -> (types, required). Numbers must be positive.
_Fields = Mapping[str, tuple[tuple[type, ...], bool]]
_TEXT, _COUNT, _FIGURE, _MAP = (str,), (int,), (int, float), (dict,)
_MACHINE: _Fields = {
    "description": (_TEXT, False), "chip": ((str, dict), True), "hosts": (_COUNT, False),
    "chips_per_host": (_COUNT, False), "max_chips_per_host": (_COUNT, True), "source": (_MAP, False),
    "domain": ((list,), True), "torus": (_MAP, False), "power_static_w": (_FIGURE, False),
    "power_active_w": (_FIGURE, False),
    "price_per_hour_usd": (_FIGURE, False), "shares_cores": (_COUNT, False),
}  # fmt: skip
_CHIP: _Fields = {
    "name": (_TEXT, True), "family": (_TEXT, True), "compile_as": (_TEXT, False),
    "xla_devices": (_COUNT, False),
    "memory_bytes": (_COUNT, False), "pool_fraction": (_FIGURE, False), "bf16_flops_per_s": (_FIGURE, False),
    "memory_bytes_per_s": (_FIGURE, False), "power_w": (_FIGURE, False), "source": (_MAP, False),
    "not_compiled_because": (_TEXT, False), "dot_bf16_flops_per_s": (_FIGURE, False),
}  # fmt: skip
_LINK: _Fields = {
    "description": (_TEXT, False), "tier": (_TEXT, True), "bytes_per_s": (_FIGURE, False),
    "pair_bytes_per_s": (_FIGURE, False),
    "uplink_bytes_per_s": (_FIGURE, False), "latency_s": (_FIGURE, False), "calibration": (_MAP, False),
    "source": (_TEXT, True),
}  # fmt: skip
_PLACE: _Fields = {"link": (_TEXT, False), "hosts": (_COUNT, False), "slices": (_COUNT, False)}
_CALIBRATION: _Fields = {
    "efficiency": (_FIGURE, False), "launch_s": (_FIGURE, False), "fill": (_FIGURE, False),
    "own_piece": (_FIGURE, False), "switch_latency_s": (_FIGURE, False),
    "switch_efficiency": (_FIGURE, False), "chunk_bytes": (_COUNT, False), "chunk_s": (_FIGURE, False),
    "source": (_TEXT, True),
}  # fmt: skip
_TORUS: _Fields = {
    "max_chips": (_COUNT, True), "shapes": ((list,), True), "cube": (_COUNT, False),
    "wrap_extent": (_COUNT, False), "source": (_TEXT, False),
}  # fmt: skip
_TYPE_NAMES = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    dict: "a table",
    list: "a list",
    bool: "true or false",
}


def machine_problems(
    table: Table, where: str, lines: Mapping[KeyPath, int], chips: list[str], links: list[str]
) -> list[Problem]:
    """Every mistake of a machine file; chips, links: the names that it may refer to."""
    problems = _table_problems(table, _MACHINE, (), where, lines)
    if isinstance(chip := table.get("chip"), dict):
        problems += _table_problems(chip, _CHIP, ("chip",), where, lines)
        problems += _word_problem(chip.get("family"), ("gpu", "tpu", "cpu"), ("chip", "family"), where, lines)
    else:
        problems += _word_problem(chip, chips, ("chip",), where, lines)
    if isinstance(torus := table.get("torus"), dict):
        problems += _torus_problems(torus, where, lines)
    rules = table.get("domain")
    for rule in rules if isinstance(rules, list) else ():
        problems += _domain_problems(rule, where, lines, links)
    return problems


def link_problems(table: Table, where: str, lines: Mapping[KeyPath, int]) -> list[Problem]:
    """Every mistake of a link file."""
    return _link_problems(table, _LINK, (), where, lines)


def _domain_problems(
    rule: object, where: str, lines: Mapping[KeyPath, int], links: list[str]
) -> list[Problem]:
    """A domain is a link and where it reaches: it names a link file, or gives the figures itself."""
    if not isinstance(rule, dict):
        return [Problem(at(where, ("domain",), lines), "is not a table", "write [[domain]] tables")]
    named = "link" in rule
    link = {key: (types, required and not named) for key, (types, required) in _LINK.items()}
    problems = _link_problems(rule, {**link, **_PLACE}, ("domain",), where, lines)
    return problems + _word_problem(rule.get("link"), links, ("domain", "link"), where, lines)


def _link_problems(
    table: Table, fields: _Fields, key: KeyPath, where: str, lines: Mapping[KeyPath, int]
) -> list[Problem]:
    problems = _table_problems(table, fields, key, where, lines)
    if isinstance(found := table.get("calibration"), dict):
        problems += _table_problems(found, _CALIBRATION, (*key, "calibration"), where, lines)
    if "bytes_per_s" in table and "uplink_bytes_per_s" in table:
        what = "a rate per device beside one per uplink"
        problems.append(Problem(at(where, (*key, "bytes_per_s"), lines), what, "give one of the two"))
    return problems + _word_problem(table.get("tier"), TIERS, (*key, "tier"), where, lines)


def _torus_problems(torus: Table, where: str, lines: Mapping[KeyPath, int]) -> list[Problem]:
    problems = _table_problems(torus, _TORUS, ("torus",), where, lines)
    shapes = torus.get("shapes")
    if isinstance(shapes, list) and not _are_shapes(shapes):
        fix = "write extents of two or three axes each: [[2, 2], [2, 4]]"
        problems.append(Problem(at(where, ("torus", "shapes"), lines), "is not a list of shapes", fix))
    return problems


def _are_shapes(shapes: list[object]) -> bool:
    lists = [shape for shape in shapes if isinstance(shape, list) and len(shape) in (2, 3)]
    if not shapes or len(lists) != len(shapes) or len({len(shape) for shape in lists}) != 1:
        return False
    return all(type(extent) is int and extent > 0 for shape in lists for extent in shape)


def _word_problem(
    word: object, known: tuple[str, ...] | list[str], key: KeyPath, where: str, lines: Mapping[KeyPath, int]
) -> list[Problem]:
    if not isinstance(word, str) or word in known:
        return []  # a wrong type is reported where types are
    what = f"unknown {key[-1]} {quoted(word)}"
    return [Problem(at(where, key, lines), what, did_you_mean(word, known, "known"))]


def _table_problems(
    table: Table, fields: _Fields, key: KeyPath, where: str, lines: Mapping[KeyPath, int]
) -> list[Problem]:
    """Unknown keys, missing keys, wrong types and numbers that are not positive."""
    problems = [
        Problem(at(where, (*key, name), lines), "unknown key", did_you_mean(name, fields, "known keys"))
        for name in table
        if name not in fields
    ]
    for name, (types, required) in fields.items():
        if name not in table:
            if required:
                problems.append(Problem(at(where, key, lines), f"{name!r} is missing", f"add {name} = …"))
        elif wrong := _value_wrong(table[name], types):
            problems.append(Problem(at(where, (*key, name), lines), wrong, ""))
    return problems


def _value_wrong(value: object, types: tuple[type, ...]) -> str:
    expected = _TYPE_NAMES[types[-1]]
    if type(value) not in types:
        return f"{quoted(value)} is not {expected}"
    finite = not isinstance(value, float) or value < float("inf")
    return "" if not isinstance(value, (int, float)) or (value > 0 and finite) else f"{value} is not positive"
