"""The plan's rules behind a collective: of the parameter that it moves where that is known, else all that use
its axes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from shardlab.analysis import CollectiveRow
from shardlab.hlo.module import Shape
from shardlab.spec.models import ModelConfig
from shardlab.spec.params import ParamSpec, parameter_table
from shardlab.spec.plan import Plan, Rules

_CONTRACTED = ("heads", "kv_heads", "mlp", "vocab", "expert", "embed")
REDUCTIONS = ("all-reduce", "reduce-scatter")
GRADIENTS = ("backward", "optimizer")
NO_PLAN = "unknown: a dump does not say by which plan it was made; --mesh FILE gives one"


@dataclass(frozen=True, slots=True)
class Rule:
    """`[table] logical = ["a", "b"]`."""

    table: str
    logical: str
    axes: tuple[str, ...]

    @property
    def text(self) -> str:
        """As a mesh file has it."""
        names = ", ".join(f'"{axis}"' for axis in self.axes)
        return f"[{self.table}] {self.logical} = [{names}]"


def parameters_of(
    row: CollectiveRow, whole: Shape | None, plan: Plan | None, model: ModelConfig | None
) -> tuple[ParamSpec, ...]:
    """The parameters that an array can be, by its layer and by its shape on a device that has it whole along
    the collective's axes. () where plan or model are not known, or nothing fits."""
    if plan is None or model is None or whole is None or not row.axes or None in whole.dims:
        return ()
    wanted = Counter(extent for extent in whole.dims if extent != 1)
    return tuple(
        spec
        for spec in parameter_table(model)
        if _within(spec.path, row.layer)
        and _local(spec, plan, row.axes) == wanted
        and _split(spec, plan, row.axes)
    )


def _within(path: str, layer: str) -> bool:
    return bool(layer) and (path == layer or path.startswith(f"{layer}/"))


def _local(spec: ParamSpec, plan: Plan, gathered: tuple[str, ...]) -> Counter[int | None]:
    """Extents on one device with the axes gathered, without the stack of layers and without ones."""
    rules = plan.params
    found: Counter[int | None] = Counter()
    for extent, logical in zip(spec.shape, spec.axes, strict=True):
        if logical == "layers":
            continue
        over = [axis for axis in rules.get(logical or "", ()) if axis not in gathered]
        ways = math.prod(plan.axes[axis] for axis in over)
        if extent % ways:
            return Counter()
        if extent != ways:
            found[extent // ways] += 1
    return found


def _split(spec: ParamSpec, plan: Plan, axes: tuple[str, ...]) -> bool:
    """Whether the plan splits it over one of these axes."""
    tables = (plan.params, plan.optimizer)
    return any(set(axes) & set(rules.get(logical or "", ())) for rules in tables for logical in spec.axes)


def rules_behind(
    row: CollectiveRow, specs: tuple[ParamSpec, ...], plan: Plan | None, model: ModelConfig | None
) -> tuple[list[Rule], str]:
    """The rules, and how they were found."""
    if plan is None:
        return [], NO_PLAN
    if not row.axes:
        return [], "unknown: it is not known over which mesh axes it goes"
    everything = list(_using(plan, row.axes))
    if specs:
        names = ", ".join(spec.path for spec in specs)
        return _of(everything, specs, row), f"of {names}, by layer and shape"
    named = [spec for spec in (parameter_table(model) if model else ()) if _within(spec.path, row.layer)]
    own = _of(everything, named, row)
    if own:
        return own, f"of the parameters of {row.layer}, the layer that it is named after"
    which = "that use these axes; which of them set it, the compiled text does not say"
    return everything, which if everything else "no rule of the plan uses these axes"


def _of(everything: list[Rule], specs: Sequence[ParamSpec], row: CollectiveRow) -> list[Rule]:
    """Those that split these parameters; of a reduction the one that splits the batch too."""
    logical = {one for spec in specs for one in spec.axes if one is not None}
    own = [rule for rule in everything if rule.table != "activations" and rule.logical in logical]
    batch = [rule for rule in everything if (rule.table, rule.logical) == ("activations", "batch")]
    return own + (batch if row.kind in REDUCTIONS and row.phase in GRADIENTS else [])


def _using(plan: Plan, axes: tuple[str, ...]) -> Iterator[Rule]:
    """Every rule with one of the axes (a part of an axis is written `fsdp:(8)8`); a table that says what
    another one does is left out."""
    wanted = {axis.partition(":")[0] for axis in axes}
    tables: Mapping[str, Rules] = {
        "params": plan.params,
        "activations": plan.activations,
        "gradients": {} if plan.gradients == plan.params else plan.gradients,
        "optimizer": {} if plan.optimizer == plan.params else plan.optimizer,
    }
    for table, rules in tables.items():
        for logical, over in rules.items():
            if wanted & set(over):
                yield Rule(table, logical, tuple(over))


def remedies(row: CollectiveRow, specs: tuple[ParamSpec, ...], plan: Plan | None) -> Iterator[str]:
    """What would remove it, from what kind of collective it is and what the plan splits over its axes."""
    if plan is None or not row.axes:
        return
    over, size = " and ".join(row.axes), row.group_size
    wanted = {axis.partition(":")[0] for axis in row.axes}
    split = wanted & {axis for name in _CONTRACTED for axis in plan.params.get(name, ())}
    if row.kind == "all-gather" and specs:
        yield (
            f"Leave {over} out of these rules: the weights then stay whole over {over}, take {size} times "
            "the memory, and are not gathered. Fewer microbatches, or a smaller axis, gather less."
        )
    elif (
        row.kind in REDUCTIONS and row.phase in GRADIENTS and wanted & set(plan.activations.get("batch", ()))
    ):
        yield (
            f"It sums gradients over {over}, which splits the batch: it goes only when the batch is not "
            f"split over {over}. More sequences per step, or [method] accumulate, make it rarer per token."
        )
    elif row.kind in REDUCTIONS and split:
        yield (
            f"It sums partial products, since {over} splits a dimension that is contracted (tensor "
            f'parallelism): a smaller {over} makes it smaller; norm_seq = ["{row.axes[0]}"] in [activations] '
            "turns an all-reduce into a reduce-scatter and a gather, which keep less in memory."
        )
