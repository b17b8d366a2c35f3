"""The shape of a mesh file: which keys, which types. pydantic checks it; the messages are ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Tag, ValidationError

from shardlab.errors import Problem
from shardlab.hardware.toml_file import KeyPath, Table, did_you_mean, quoted, shown

_STRICT = ConfigDict(extra="forbid", strict=True)
RuleLists = dict[str, list[str]]


class NamedRemat(BaseModel):
    """Activations of a layer by name (`spec.remat.ACTIVATIONS`), kept on the device or on its host."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    keep: list[str] = []
    offload: list[str] = []

    def __str__(self) -> str:
        return ", ".join(f"{place} {' '.join(names)}" for place, names in self if names)


RematWord = Literal["none", "full", "selective", "matmuls", "offload"]


class Method(BaseModel):
    """What rules cannot say."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    pipeline: Literal["none", "gpipe", "1f1b", "interleaved", "zb-h1"] = "none"
    microbatches: int | None = None
    virtual_stages: int | None = None
    accumulate: int = 1
    gradient_sums: Literal["f32", "bf16"] = "f32"
    loss: Literal["auto", "unfused"] = "auto"
    loss_parts: int = 1
    context: Literal["none", "all-gather", "ring", "ulysses", "ring+ulysses"] = "none"
    experts: str = "dropless"
    remat: Annotated[
        Annotated[RematWord, Tag("word")] | Annotated[NamedRemat, Tag("names")],
        Discriminator(lambda value: "names" if isinstance(value, (dict, NamedRemat)) else "word"),
    ] = "full"
    products: Literal["bf16", "fp8", "fp8-rowwise", "int8"] = "bf16"
    lora: int | None = None
    lora_alpha: int | None = None
    lora_targets: list[str] = ["query", "value"]
    attention: Literal["auto", "reference", "unfused", "blockwise", "cudnn", "splash"] = "auto"
    chunk: int = 1
    weights: Literal["bf16", "int8", "fp8"] = "bf16"
    state: Literal["f32", "bf16"] = "f32"
    lookup: Literal["rows", "one-hot"] = "rows"
    scan_layers: bool = True


class Check(BaseModel):
    """What `shardlab check` compiles the plan with; defaults for the other verbs."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    model: str | None = None
    batch: int | None = None
    seq: int | None = None
    workload: Literal["train", "prefill", "decode"] = "train"
    step: str | None = None


class BlockTable(BaseModel):
    """`[blocks.NAME.params]` and `[blocks.NAME.optimizer]`."""

    model_config = _STRICT

    params: RuleLists = {}
    optimizer: RuleLists = {}


class CompilerTable(BaseModel):
    """`[compiler]`: flags, or the path of a file of flags."""

    model_config = _STRICT

    flags: list[str] | str = []


class PlanTable(BaseModel):
    """A mesh file as it is written."""

    model_config = _STRICT

    description: str = ""
    on: str | None = None
    order: Literal["make_mesh", "row-major"] | list[int] = "make_mesh"
    axes: dict[str, int] = {}
    params: RuleLists = {}
    activations: RuleLists = {}
    gradients: RuleLists = {}
    optimizer: RuleLists = {}
    blocks: dict[str, BlockTable] = {}
    method: Method = Method()
    compiler: CompilerTable = CompilerTable()
    check: Check = Check()


_KNOWN_KEYS: Mapping[KeyPath, Sequence[str]] = {
    (): ("extends", *PlanTable.model_fields),
    ("method",): tuple(Method.model_fields),
    ("method", "remat"): tuple(NamedRemat.model_fields),
    ("compiler",): tuple(CompilerTable.model_fields),
    ("check",): tuple(Check.model_fields),
}
_RULES_FIX = 'write a list of mesh axes: ["fsdp"]'
_FIXES: Mapping[KeyPath, str] = {
    ("axes",): "write a table of axis = size",
    ("order",): 'write "make_mesh", "row-major" or a list of device ids',
    ("compiler", "flags"): 'write a list of flags, or "path/of/flags"',
}
_TYPES = {
    "string_type": "a string",
    "int_type": "a whole number",
    "list_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
}


def read_table(table: Table, where: Callable[[KeyPath], str]) -> tuple[PlanTable, list[Problem]]:
    """The file as a record, and what is wrong with its shape. What is wrong is left out of the record.

    where: tells the `file:line: key` of a key path.
    """
    try:
        return PlanTable.model_validate(table), []
    except ValidationError as error:
        found = {_key_path(e["loc"], table): e for e in reversed(error.errors(include_url=False))}
    problems = [_problem(key, e, table, where) for key, e in sorted(found.items(), key=lambda kv: kv[0])]
    return PlanTable.model_validate(_without(table, set(found))), problems


def _key_path(location: tuple[int | str, ...], table: Table) -> KeyPath:
    """The part of pydantic's location that consists of the file's own keys."""
    path: list[str] = []
    value: object = table
    for part in location:
        if part in ("word", "names"):  # pydantic's tags, of which kind of value it took this for
            continue
        if not isinstance(value, dict) or not isinstance(part, str) or part not in value:
            break
        path.append(part)
        value = value[part]
    return tuple(path)


def _problem(key: KeyPath, error: Any, table: Table, where: Callable[[KeyPath], str]) -> Problem:
    if error["type"] == "extra_forbidden":
        known = ("params", "optimizer") if key[0] == "blocks" else _KNOWN_KEYS.get(key[:-1], ())
        return Problem(where(key), "unknown key", did_you_mean(key[-1], known, "known keys"))
    value = _value(table, key)
    if error["type"] == "literal_error" and key not in _FIXES:
        choices = error["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        return Problem(
            where(key), f"{quoted(value)} is not a choice", did_you_mean(str(value), choices, "choices")
        )
    if _is_rule(key):
        word = isinstance(value, str) and re.fullmatch(r"[\w-]{1,30}", value)
        fix = f'write {shown(key[-1])} = ["{value}"]' if word else _RULES_FIX
        return Problem(where(key), f"{quoted(value)} is not a list of mesh axes", fix)
    if key[0] == "axes" and len(key) == 2:
        return Problem(where(key), f"{quoted(value)} is not a whole number", f"write {shown(key[1])} = 8")
    expected = "as it should be" if key in _FIXES else _TYPES.get(error["type"], "of the right type")
    fix = _FIXES.get(key, f"write {expected}")
    what = (
        f"{quoted(value)} is not {expected}" if key not in _FIXES else f"{quoted(value)} has the wrong type"
    )
    return Problem(where(key), what, fix)


def _is_rule(key: KeyPath) -> bool:
    rules = ("params", "activations", "gradients", "optimizer")
    return (len(key) == 2 and key[0] in rules) or (len(key) == 4 and key[0] == "blocks")


def _value(table: Table, key: KeyPath) -> object:
    value: object = table
    for part in key:
        value = value[part] if isinstance(value, dict) else None
    return value


def _without(table: Table, keys: set[KeyPath], prefix: KeyPath = ()) -> Table:
    """The table less the keys that are wrong. As deep as the deepest wrong key, at most four."""
    kept: Table = {}
    for name, value in table.items():
        key = (*prefix, name)
        if key in keys:
            continue
        nested = isinstance(value, dict) and any(wrong[: len(key)] == key for wrong in keys)
        kept[name] = _without(value, keys, key) if nested and isinstance(value, dict) else value
    return kept
