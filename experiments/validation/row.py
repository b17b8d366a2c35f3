"""The record of one published workload, and how a mesh file is written for it."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from shardlab.cost.compute_time import ATTENTION_KERNEL
from shardlab.errors import Infeasible, UserError
from shardlab.spec.case import Case, make_case
from shardlab.spec.models import ModelConfig
from shardlab.spec.plan import plan_from_text
from validation.memory import Reserved
from validation.substitution import Counts

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One published workload.

    chip: as the hardware files name it. measured_step_s: None for rows that have none. case: what is
    compiled; None where `excluded_because` names the feature that shardlab lacks, or the contradiction that
    the source holds. counts: what stands in this row for the numbers that the shared program of `case` has;
    None where the case is the row itself. measured_bytes: peak memory of one device.
    reserved: what PyTorch's allocator reserves of them where our program holds something else; None where
    what is alive was measured.
    attention_kernel: the kernel that the row ran, in_pieces_over: the axis whose collectives it ran beside
    its products, both as `predict` has them. free_stages: whether its stages were programs of their own.
    group: rows of one group are what a user would choose among. notes: where the case is only near the row.
    """

    source: str
    row: str
    chip: str
    measured_step_s: float | None
    case: Case | None = None
    excluded_because: str = ""
    counts: Counts | None = None
    measured_bytes: float | None = None
    reserved: Reserved | None = None
    attention_kernel: str = ATTENTION_KERNEL
    in_pieces_over: str | None = None
    free_stages: bool = False
    group: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read_table(name: str) -> list[dict[str, str]]:
    """The lines of a file of `data`."""
    with (DATA / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def with_case(row: Row, text: str, model: str | ModelConfig, batch: int, seq: int) -> Row:
    """The row with its case, or excluded with the reason why its plan cannot be put on the model.

    text: the plan as a mesh file.
    """
    try:
        case = make_case(plan_from_text(text, row.row), model, batch=batch, seq=seq)
    except (Infeasible, UserError) as error:
        return replace(row, excluded_because="; ".join(str(error).splitlines()))
    return replace(row, case=case)


def plan_text(
    machine: str,
    axes: Mapping[str, int],
    *,
    fsdp: Iterable[str] = ("fsdp",),
    zero1: Iterable[str] = (),
    batch: Iterable[str] = ("fsdp",),
    sequence_parallel: bool = False,
    split_hops: bool = False,
    method: Mapping[str, object] | None = None,
    blocks: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
    flags: Sequence[str] = (),
) -> str:
    """A mesh file. Axes of size one are left out, and with them what they would split.

    fsdp, zero1, batch: the axes that split `embed` of the weights, of the optimizer's state alone, and the
    batch; `tensor` splits heads, MLP and vocabulary, `stage` the layers, `expert` the experts. method: values
    as JSON writes them, a mapping as an inline table. blocks: by block family the rules of its parameters.
    split_hops: whether `tensor` splits what passes between stages, too.
    """
    used = {name: size for name, size in axes.items() if size > 1}
    params = {"embed": [axis for axis in fsdp if axis in used]}
    if "tensor" in used:
        params |= {name: ["tensor"] for name in ("heads", "kv_heads", "mlp", "vocab")}
    params |= {name: [name] for name in ("stage", "expert") if name in used}
    activations = {"batch": [axis for axis in (*batch, "expert") if axis in used]}
    if sequence_parallel and "tensor" in used:
        activations["norm_seq"] = ["tensor"]
    elif split_hops and {"stage", "tensor"} <= used.keys():
        activations["hop_seq"] = ["tensor"]
    optimizer = {"embed": [axis for axis in zero1 if axis in used]}
    tables = {
        "axes": {name: str(size) for name, size in used.items()},
        "params": {name: _list(names) for name, names in params.items() if names},
        "optimizer": {name: _list(names) for name, names in optimizer.items() if names},
        "activations": {name: _list(names) for name, names in activations.items() if names},
        "method": {key: _value(value) for key, value in (method or {}).items()},
        "compiler": {"flags": json.dumps(list(flags))} if flags else {},
    }
    for name, rules in (blocks or {}).items():
        kept = {key: [axis for axis in split if axis in used] for key, split in rules.items()}
        tables[f"blocks.{name}.params"] = {key: _list(split) for key, split in kept.items()}
    lines = [f'on = "{machine}"']
    for table, entries in tables.items():
        lines += [f"[{table}]", *(f"{key} = {value}" for key, value in entries.items())] if entries else []
    return "\n".join(lines) + "\n"


def _value(value: object) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {json.dumps(entry)}" for key, entry in value.items()) + "}"
    return json.dumps(value)


def _list(names: Iterable[str]) -> str:
    return json.dumps(list(names))
