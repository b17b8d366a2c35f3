"""Where an instruction comes from: phase of the step, layer, source line; all from its metadata.

JAX writes the path of scopes into `op_name`:
`jit(step)/transpose(jvp(layers))/while/body/attention/query/dot_general`. The last part is the primitive;
transformations wrap the scope that they were applied in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from shardlab.hlo.attributes import Metadata, metadata
from shardlab.hlo.lookup import active, may_mention
from shardlab.hlo.module import Instruction, Module

OPTIMIZER_SCOPE = "optimizer"
MAX_PATHS = 256
MAX_NESTING = 16

_PHASES = ("other", "forward", "backward", "optimizer")  # in the order in which a step runs them

# Parts that JAX adds for control flow and transformations; none of them is a scope of the user's.
_PLUMBING = frozenset(
    {
        "while", "body", "cond", "scan", "closed_call", "core_call", "pjit", "shard_map", "eval_jaxpr",
        "remat", "remat2", "checkpoint", "rematted_computation", "custom_jvp_call", "custom_vjp_call",
        "custom_vjp_call_jaxpr", "custom_lin", "named_call", "xla_call", "body_fun", "cond_fun", "main",
        "run_state", "mul_to_shard_map",
    }
)  # fmt: skip
_JAX = re.compile(r"(p?jit|pmap|xmap)\(")
_NO_SCOPE = re.compile(
    r"branch_\d+_fun|(aten|prim|torch_xla|xla)__\w+(\.\d+)?"
)  # nor operations of PyTorch/XLA
_WRAPPER = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)\((.*)\)", re.DOTALL)
# Wrappers whose argument is a scope; the argument of any other (`jit`, `pjit`) names a function.
_TRANSFORMS = frozenset({"jvp", "transpose", "vmap", "remat", "checkpoint", "linearize", "pmap", "batch"})


@dataclass(frozen=True, slots=True)
class Origin:
    """phase: forward | backward | optimizer | other. recompute: done again for the backward pass (remat).

    layer: path of the user's scopes, `layers/attention/query`. source: `basename:line`. Empty where unknown.
    """

    phase: str
    recompute: bool
    op_name: str
    layer: str
    source: str


def is_training(module: Module, computations: Iterable[str]) -> bool:
    """Whether something in `computations` was differentiated: then what was not is neither forward nor
    backward."""
    return any(
        "jvp(" in instruction.attributes.get("metadata", "")
        for name in computations
        if may_mention(module.computations[name].instructions, "jvp(")
        for instruction in active(module.computations[name].instructions)
    )


def origin_of(
    module: Module, instructions: Iterable[Instruction], training: bool, nearby: Callable[[], str]
) -> Origin:
    """Origin of the first of `instructions` that says it: a collective, then the fusion or start around it.

    nearby: asked when none of them says it, for the op_name of a neighbour; that gives phase and layer only.
    """
    found = [metadata(instruction) for instruction in instructions]
    op_name = next((data.op_name for data in found if "/" in data.op_name), "")
    source = next((text for text in (source_of(module, data) for data in found) if text), "")
    telling = op_name or nearby()
    phase, recompute = phase_of(telling, training)
    own = op_name or next((data.op_name for data in found if data.op_name), "")
    return Origin(phase, recompute, own, layer_of(telling), source)


@lru_cache(maxsize=4096)
def phase_of(op_name: str, training: bool) -> tuple[str, bool]:
    """(phase, recompute) of an op_name; `training`: whether the program differentiates anything.

    A combined collective waits for the last of its parts, so it has the latest of their phases.
    """
    phases = [_phase_of_path(parts, training) for parts in _alternatives(op_name)]
    latest = max((phase for phase, _ in phases), key=_PHASES.index)
    return latest, all(recompute for _, recompute in phases)


@lru_cache(maxsize=4096)
def layer_of(op_name: str) -> str:
    """The user's scopes in an op_name, joined by `/`, without the primitive at the end.

    Of a combined collective, the scopes that its parts share.
    """
    layers = [_scopes(parts[:-1]) for parts in _alternatives(op_name)]
    shared = []
    for level in zip(*layers, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return "/".join(shared)


def _phase_of_path(parts: Sequence[str], training: bool) -> tuple[str, bool]:
    recompute = "rematted_computation" in parts
    if OPTIMIZER_SCOPE in parts or OPTIMIZER_SCOPE in map(_unwrapped, parts):
        return "optimizer", False
    if any(_is_wrapped(part, "transpose") for part in parts):
        return "backward", recompute
    if any(_is_wrapped(part, "jvp") for part in parts):
        return "forward", False
    known = len(parts) > 1 and _JAX.match(
        parts[0]
    )  # what another framework calls its operations says nothing
    return "forward" if known and not training else "other", False


def _scopes(parts: Iterable[str]) -> list[str]:
    scopes = map(_unwrapped, parts)
    return [s for s in scopes if s and s not in _PLUMBING and not _NO_SCOPE.fullmatch(s)]


def _alternatives(op_name: str) -> list[list[str]]:
    """Paths of an op_name. XLA joins those of what it combines: `a/(b/c:d)/e` is a/b/c/e and a/d/e, and since
    2026 `a/b;a/c` is both."""
    paths: list[list[str]] = []
    todo = [_split(path, "/") for path in reversed(_split(op_name, ";")[:MAX_PATHS])]
    for _ in range(4 * MAX_PATHS):  # names come from a file: neither their breadth nor their depth is trusted
        if not todo:
            break
        parts = todo.pop()
        at = next((i for i, p in enumerate(parts) if p.startswith("(") and p.endswith(")")), None)
        if at is None:
            paths.append(parts)
        else:
            branches = _split(parts[at][1:-1], ":")[: max(1, MAX_PATHS - len(paths) - len(todo))]
            todo += [[*parts[:at], *_split(branch, "/"), *parts[at + 1 :]] for branch in reversed(branches)]
    return paths + todo


def _split(text: str, separator: str) -> list[str]:
    """`text` split where `separator` is in no parenthesis."""
    parts, depth, start = [], 0, 0
    for index, char in enumerate(text):
        if char == "(":
            depth += 1
        elif char == ")":
            depth = max(0, depth - 1)
        elif char == separator and not depth:
            parts.append(text[start:index])
            start = index + 1
    return [*parts, text[start:]]


def _unwrapped(part: str) -> str:
    """`transpose(jvp(layers))` -> `layers`; `jit(step)` -> ``."""
    for _ in range(MAX_NESTING):
        match = _WRAPPER.fullmatch(part)
        if match is None:
            return part
        if match[1] not in _TRANSFORMS:
            return ""
        part = match[2]
    return ""


def _is_wrapped(part: str, transform: str) -> bool:
    for _ in range(MAX_NESTING):
        match = _WRAPPER.fullmatch(part)
        if match is None:
            return False
        if match[1] == transform:
            return True
        part = match[2]
    return False


def source_of(module: Module, data: Metadata) -> str:
    """`basename:line` of an instruction, from either form of metadata; empty where it does not say."""
    file, line = data.source_file, data.source_line
    frame = module.stack_frames.get(data.stack_frame_id)
    if not file and frame is not None:
        file, line = frame.file, frame.line
    basename = file.replace("\\", "/").rpartition("/")[2]
    return f"{basename}:{line}" if file else ""
