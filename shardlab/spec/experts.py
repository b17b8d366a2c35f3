"""What a plan says about experts: over which mesh axes, and how many tokens each may take; and whether it
can be.

Dropless: every token reaches all experts that its router chose (MegaBlocks, arXiv:2211.15841). Capacity F:
the tokens of one device are a group, of which each expert takes at most `expert_capacity`; the rest is
dropped (GShard, arXiv:2006.16668, section 2.2; Switch Transformer, arXiv:2101.03961, eq. 3).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from math import ceil

from shardlab.errors import Problem
from shardlab.hardware.toml_file import KeyPath, quoted
from shardlab.spec.models import ModelConfig
from shardlab.spec.plan_schema import Method

DROPLESS = "dropless"

_Rules = Mapping[str, Sequence[str]]


def capacity_factor(experts: str) -> Fraction | None:
    """`capacity 1.25` -> 5/4; None for `dropless`. Raises ValueError for anything else."""
    if experts == DROPLESS:
        return None
    match = re.fullmatch(r"capacity (\d{1,6}(?:\.\d{1,6})?)", experts, re.ASCII)
    if match is None or not Fraction(match[1]):
        raise ValueError(f"{experts!r} is neither dropless nor a capacity")
    return Fraction(match[1])


def expert_capacity(factor: Fraction, tokens: int, experts_per_token: int, num_experts: int) -> int:
    """Tokens of a group that one expert takes: ceil(factor · tokens · experts_per_token / num_experts)."""
    return ceil(factor * tokens * experts_per_token / num_experts)


def expert_axes(params: _Rules, activations: _Rules) -> tuple[str, ...]:
    """The mesh axes over which experts stay split in use; others that split them are gathered, as FSDP
    does."""
    return tuple(axis for axis in params.get("expert", ()) if axis in activations.get("expert", ()))


def experts_problems(
    params: _Rules, activations: _Rules, method: Method, where: Callable[[KeyPath], str]
) -> list[Problem]:
    """Experts lie where tokens are split, and `[method] experts` can be read. The tables are complete."""
    problems = []
    try:
        capacity_factor(method.experts)
    except ValueError:
        what = f"{quoted(method.experts)} is neither dropless nor a capacity"
        fix = 'use "dropless", or "capacity 1.25"'
        problems.append(Problem(where(("method", "experts")), what, fix))
    tokens = {name for axis in ("batch", "seq", "norm_seq") for name in activations.get(axis, ())}
    for name in expert_axes(params, activations):
        if name not in tokens:
            what = f"experts over {name!r}, whose devices hold the same tokens"
            fix = f"add {name!r} to batch in [activations]"
            problems.append(Problem(where(("params", "expert")), what, fix))
    return problems


def experts_obstacles(
    model: ModelConfig, params: _Rules, activations: _Rules, method: Method, workload: str
) -> dict[str, str]:
    """Why this model's experts cannot be as the plan says: reason -> what can. Empty when they can."""
    if not model.num_experts:
        if method.experts == DROPLESS:
            return {}
        return {f"experts = {method.experts!r} for a model without experts": "leave experts out"}
    found = {}
    if method.pipeline != "none" and model.dense_layers:
        what = f"{model.dense_layers} leading dense layers in a pipeline, whose layers are of one kind"
        found[what] = "use pipeline = 'none'"
    if method.pipeline != "none" and (model.router_bias or model.balance == "sequence"):
        found["balance by sequence or by biases in a pipeline"] = "use pipeline = 'none'"
    if split := activations.get("embed", ()):
        what = f"experts beside 2-D tensor parallelism ({' x '.join(split)}): tokens travel whole"
        found[what] = "take embed out of [activations]"
    if workload == "decode":
        alike = [a for a in expert_axes(params, activations) if a not in activations.get("batch", ())]
        for name in alike:
            found[f"experts over {name}, which splits no tokens of a decode step"] = f"add {name!r} to batch"
    return found
