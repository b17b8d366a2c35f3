"""What must hold between the keys of a mesh file. Each check returns problems; none stops the others."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from shardlab.errors import Problem, UserError
from shardlab.hardware.catalog import MAX_DEVICES, load_machine
from shardlab.hardware.toml_file import KeyPath, Table, did_you_mean, quoted
from shardlab.spec.models import find_model
from shardlab.spec.plan_schema import BlockTable, Check, Method, PlanTable
from shardlab.spec.sharding import ACTIVATION_ARRAYS, BLOCK_ARRAYS, CACHE_ARRAY, PARAM_ARRAYS, double_use

STEP = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")  # package.module:make_step
PARAM_AXES = (
    "embed", "latent", "heads", "kv_heads", "head_dim", "mlp", "vocab", "layers", "expert", "stage",
)  # fmt: skip
# Of one layer's parts: where layers and stages lie is the same for all.
BLOCK_AXES = tuple(axis for axis in PARAM_AXES if axis not in ("vocab", "layers", "stage"))
ACTIVATION_AXES = (
    "batch", "seq", "norm_seq", "hop_seq", "kv_seq", "embed", "heads", "kv_heads", "mlp", "vocab", "expert",
    "cache",
)  # fmt: skip

Where = Callable[[KeyPath], str]
Rules = Mapping[str, Sequence[str]]

_AXIS_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,30}")  # reports join axes with + and write sub-axes x:(2)4


def axes_problems(written: Table, axes: Mapping[str, int], where: Where) -> list[Problem]:
    """Axes exist, with names that reports can write and sizes from 1. written: `[axes]` as in the file."""
    if not written:
        return [Problem(where(("axes",)), "no mesh axis", "add a table [axes] with, for example, fsdp = 8")]
    problems = [
        Problem(where(("axes", name)), "not a name for an axis", "use letters, digits, - and _")
        for name in written
        if not _AXIS_NAME.fullmatch(name) or name == "unknown"
    ]
    return problems + [
        Problem(where(("axes", name)), f"size {size}", "an axis has a size of at least 1")
        for name, size in axes.items()
        if size < 1
    ]


def rules_problems(table: PlanTable, axes: Iterable[str], where: Where) -> list[Problem]:
    """Rules name logical axes and mesh axes that exist, each mesh axis once."""
    tables: list[tuple[KeyPath, Rules, Sequence[str]]] = [
        (("params",), table.params, PARAM_AXES),
        (("activations",), table.activations, ACTIVATION_AXES),
        (("gradients",), table.gradients, PARAM_AXES),
        (("optimizer",), table.optimizer, PARAM_AXES),
    ]
    problems = []
    for name, block in table.blocks.items():
        tables += [
            (("blocks", name, "params"), block.params, BLOCK_AXES),
            (("blocks", name, "optimizer"), block.optimizer, BLOCK_AXES),
        ]
    for key, rules, logical in tables:
        problems += _table_problems(key, rules, logical, axes, where)
    return problems


def blocks_problems(
    table: PlanTable, blocks: Mapping[str, Mapping[str, Rules]], where: Where
) -> list[Problem]:
    """Block families exist, and the rules of each are consistent in themselves. blocks: complete."""
    problems = []
    for name, block in table.blocks.items():
        if name not in BLOCK_ARRAYS:
            fix = did_you_mean(name, BLOCK_ARRAYS, "block families")
            problems.append(Problem(where(("blocks", name)), "unknown block family", fix))
            continue
        params, optimizer = (blocks.get(name, {}).get(kind, {}) for kind in ("params", "optimizer"))
        arrays = {what: PARAM_ARRAYS[what] for what in BLOCK_ARRAYS[name]}

        def at(key: KeyPath, name: str = name, block: BlockTable = block) -> str:
            own = block.params if key[0] == "params" else block.optimizer
            return where(("blocks", name, *key) if key[1] in own else ("blocks", name))

        problems += _double_use([(("params",), params, arrays), (("optimizer",), optimizer, arrays)], at)
        problems += zero_problems(params, {}, optimizer, at)
    return problems


def _table_problems(
    key: KeyPath, rules: Rules, logical: Sequence[str], axes: Iterable[str], where: Where
) -> list[Problem]:
    problems = []
    for axis, split in rules.items():
        place = where((*key, axis))
        if axis not in logical:
            fix = did_you_mean(axis, logical, "logical axes")
            problems.append(Problem(place, "unknown logical axis", fix))
        for position, name in enumerate(split):
            if name not in axes:
                what = f"names no mesh axis {quoted(name)}"
                problems.append(Problem(place, what, did_you_mean(name, axes, "mesh axes")))
            elif name in split[:position]:
                problems.append(Problem(place, f"names mesh axis {name!r} twice", "name it once"))
    return problems


def double_use_problems(
    params: Rules, activations: Rules, optimizer: Rules, blocks: Iterable[str], where: Where
) -> list[Problem]:
    """No mesh axis splits two dimensions of one array. The tables are complete: what follows is filled in.
    blocks: those that have rules of their own."""
    own = {what for name in blocks for what in BLOCK_ARRAYS.get(name, ())}
    weights = {what: axes for what, axes in PARAM_ARRAYS.items() if what not in own}
    streams = {**ACTIVATION_ARRAYS, "KV cache": CACHE_ARRAY}
    return _double_use(
        [
            (("params",), params, weights),
            (("activations",), activations, streams),
            (("optimizer",), optimizer, weights),
        ],
        where,
    )


def _double_use(
    tables: Iterable[tuple[KeyPath, Rules, Mapping[str, Sequence[str | None]]]], where: Where
) -> list[Problem]:
    problems: dict[tuple[str, ...], Problem] = {}
    for key, rules, arrays in tables:
        for what, axes in arrays.items():
            for clash in double_use(axes, rules):
                # The same clash shows in several arrays, and in tables that follow another: report it once.
                same = (clash.mesh_axis, *sorted((clash.first, clash.second)))
                if clash.first != clash.second:
                    problems.setdefault(same, clash.problem(where((*key, clash.second)), what))
    return list(problems.values())


def zero_problems(params: Rules, gradients: Rules, optimizer: Rules, where: Where) -> list[Problem]:
    """ZeRO shards the optimizer state first, then gradients, then parameters (arXiv:1910.02054, section 5):
    each is split as the next, or as the one before. gradients: as written; optimizer: complete.
    """
    states = {name for names in optimizer.values() for name in names}
    problems = [
        Problem(
            where(("optimizer", axis)),
            f"optimizer state whole over {name!r}, which splits its parameters",
            f"write {axis} = {_list(names)} in [optimizer], or take {name!r} out of [params]",
        )
        for axis, names in params.items()
        for name in names
        if name not in states
    ]
    return problems + [
        Problem(
            where(("gradients", axis)),
            f"gradients are split over {_list(split)}, neither as parameters nor as optimizer state",
            f"write {axis} = {_list(optimizer.get(axis, ()))}, or leave it out",
        )
        for axis, split in gradients.items()
        if tuple(split) not in (tuple(params.get(axis, ())), tuple(optimizer.get(axis, ())))
    ]


def _list(names: Sequence[str]) -> str:
    return f"[{', '.join(map(quoted, names))}]"


def order_problems(order: str | tuple[int, ...], devices: int, where: Where) -> list[Problem]:
    """An explicit order lists every device once."""
    if isinstance(order, str) or sorted(order) == list(range(min(devices, MAX_DEVICES))):
        return []
    what = f"{len(order)} ids that are not a permutation of the {devices} devices"
    return [Problem(where(("order",)), what, f"list each of 0 to {devices - 1} once")]


def machine_problems(on: str, axes: Mapping[str, int] | None, where: Where) -> list[Problem]:
    """The default machine exists and has as many devices as the axes (None: the axes are not known)."""
    if on == "attached":
        return []  # as many devices as the axes ask for
    try:
        devices = load_machine(on).num_devices
    except UserError as error:
        return [Problem(where(("on",)), f"{p.where}: {p.what}", p.fix) for p in error.problems]
    if axes is None:
        return []
    grid, product = grid_size(axes)
    if product != devices:
        fix = f"make the axes multiply to {devices}, or change on"
        return [Problem(where(("axes",)), f"{grid} devices, but {on} has {devices}", fix)]
    return []


def grid_size(axes: Mapping[str, int]) -> tuple[str, int]:
    """`fsdp 64 x tensor 8 = 512`, and 512."""
    product = math.prod(axes.values())
    return f"{' x '.join(f'{name} {size}' for name, size in axes.items())} = {product}", product


def method_problems(method: Method, where: Where) -> list[Problem]:
    """Numbers that mean nothing, and methods that exclude each other."""
    problems: list[Problem] = []
    if method.gradient_sums != "f32" and method.accumulate < 2 and method.pipeline == "none":
        what = f"{quoted(method.gradient_sums)} without microbatches, whose gradients would be summed"
        problems.append(Problem(where(("method", "gradient_sums")), what, "remove it, or say accumulate = 2"))
    if method.accumulate < 1:
        what = f"{method.accumulate} microbatches"
        problems.append(Problem(where(("method", "accumulate")), what, "use 1 or more"))
    problems += [
        Problem(where(("method", key)), f"{value}", "use 1 or more")
        for key, value in (("chunk", method.chunk), ("loss_parts", method.loss_parts))
        if value < 1
    ]
    return problems


def pipeline_problems(params: Rules, activations: Rules, method: Method, where: Where) -> list[Problem]:
    """Stages and a schedule go together, and say each thing once. Which models can have them comes later."""
    problems: list[tuple[KeyPath, str, str]] = []
    split = tuple(params.get("stage", ()))
    if method.pipeline == "none":
        problems += [
            (("method", key), "belongs to a pipeline, and pipeline is none", f"remove {key}, or say pipeline")
            for key in ("microbatches", "virtual_stages")
            if getattr(method, key) is not None
        ]
        if split:
            problems.append(
                (("params", "stage"), "stages without a pipeline", 'say pipeline = "1f1b", or remove stage')
            )
    else:
        if len(split) != 1:
            problems.append(
                (
                    ("method", "pipeline"),
                    f"{len(split)} mesh axes for its stages",
                    'write stage = ["stage"] in [params]',
                )
            )
        if params.get("layers"):
            problems.append((("params", "layers"), "layers lie on the stages of the pipeline", "remove it"))
        problems += _pipeline_method_problems(method)
        problems += [
            (("activations", axis), f"splits activations over the stages ({name})", f"take {name!r} out")
            for axis, names in activations.items()
            for name in names
            if name in split
        ]
    return [Problem(where(key), what, fix) for key, what, fix in problems]


def _pipeline_method_problems(method: Method) -> list[tuple[KeyPath, str, str]]:
    """What `[method]` cannot say beside a pipeline."""
    problems: list[tuple[KeyPath, str, str]] = []
    if method.accumulate > 1:
        problems.append(
            (
                ("method", "accumulate"),
                "a pipeline accumulates over its microbatches",
                "say microbatches alone",
            )
        )
    if method.loss_parts > 1:
        what = f"{method.loss_parts}: the last stage of a pipeline has a microbatch's logits at once"
        problems.append((("method", "loss_parts"), what, "remove it, or say more microbatches"))
    if method.products != "bf16" and method.pipeline == "zb-h1":
        what = f"{quoted(method.products)}: ZB-H1 splits each backward product in two, in bf16"
        problems.append((("method", "products"), what, 'use "bf16", or pipeline = "1f1b"'))
    if method.virtual_stages is not None and method.pipeline != "interleaved":
        fix = 'remove it, or use pipeline = "interleaved"'
        problems.append((("method", "virtual_stages"), f"{method.pipeline} has one chunk per stage", fix))
    problems += [
        (("method", key), f"{value}", "use 1 or more")
        for key in ("microbatches", "virtual_stages")
        if (value := getattr(method, key)) is not None and value < 1
    ]
    return problems


CONTEXT_AXES = {"all-gather": 1, "ring": 1, "ulysses": 1, "ring+ulysses": 2}


def context_problems(activations: Rules, method: Method, where: Where) -> list[Problem]:
    """Context parallelism has its mesh axes, and nothing moves its tokens elsewhere."""
    if method.context == "none":
        return []
    split, wanted = tuple(activations.get("seq", ())), CONTEXT_AXES[method.context]
    problems: list[tuple[KeyPath, str, str]] = []
    if len(split) != wanted:
        what = f"{quoted(method.context)} with seq over {len(split)} mesh axes"
        fix = 'seq = ["context"]' if wanted == 1 else 'seq = ["ring", "ulysses"]'
        problems.append((("method", "context"), what, f"write {fix} in [activations]"))
    elif tuple(activations.get("norm_seq", split))[:wanted] != split:
        fix = f"let it begin with {', '.join(split)}, or remove it"
        problems.append((("activations", "norm_seq"), "moves the tokens of context parallelism", fix))
    if tuple(activations.get("kv_seq", split)) != split:
        what = f"keys and values do not lie as {method.context} takes them"
        problems.append((("activations", "kv_seq"), what, "remove it"))
    if method.attention not in ("auto", "blockwise") and method.context != "ulysses":
        what = f"{quoted(method.attention)}, but {method.context} merges blocks of keys by itself"
        problems.append((("method", "attention"), what, 'use "auto"'))
    if method.pipeline != "none" and method.context.startswith("ring"):
        what = (
            f"{quoted(method.context)} in a pipeline: all devices take part in a hop of the ring, and stages "
            "are at different work"
        )
        fix = 'use "all-gather", which sends as much forward, or "ulysses"'
        problems.append((("method", "context"), what, fix))
    return [Problem(where(key), what, fix) for key, what, fix in problems]


def check_problems(check: Check, where: Where) -> list[Problem]:
    """The model of `[check]` is known (a step's own may be called anything); batch and seq are at least 1."""
    problems: list[Problem] = []
    if check.step is not None:
        problems += step_problems(check.step, where(("check", "step")))
    elif check.model is not None:
        try:
            find_model(check.model, where(("check", "model")))
        except UserError as error:
            problems += error.problems
    for key in ("batch", "seq"):
        value = getattr(check, key)
        if value is not None and value < 1:
            problems.append(Problem(where(("check", key)), f"{value}", "use 1 or more"))
    return problems


def step_problems(step: str, where: str = "--step") -> tuple[Problem, ...]:
    """What is wrong with a step's name."""
    module, _, function = step.partition(":")
    if STEP.fullmatch(step) and not module.endswith(".py"):
        return ()
    if module.endswith(".py"):
        dotted = module.removesuffix(".py").strip("./").replace("/", ".")
        fix = f"write it as a module: {dotted}:{function or 'make_step'}"
    else:
        fix = "write it as package.module:make_step"
    return (Problem(where, f"{step[:80]!r} is no function of a module", fix),)


def flags_problems(flags: Sequence[str], where: Where) -> list[Problem]:
    """Flags look like flags."""
    return [
        Problem(where(("compiler", "flags")), f"{quoted(flag)} is not a flag", "flags start with --")
        for flag in flags
        if not re.fullmatch(r"--[\w-]+(=\S*)?", flag)
    ]
