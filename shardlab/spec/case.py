"""A case: plan x model x machine x workload. The unit that is compiled, cached and reported."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import BaseModel, ConfigDict

from shardlab.errors import Infeasible, Problem, UserError
from shardlab.hardware.catalog import load_machine
from shardlab.hardware.machine import Machine
from shardlab.spec.context import context_obstacles, ulysses_kv_note
from shardlab.spec.experts import experts_obstacles
from shardlab.spec.lora import adapter_table
from shardlab.spec.models import ModelConfig, find_model
from shardlab.spec.nearest import Array, nearest_size
from shardlab.spec.params import ParamSpec, parameter_table
from shardlab.spec.pipeline import layout_of, num_microbatches, obstacles
from shardlab.spec.plan import Plan
from shardlab.spec.plan_checks import grid_size
from shardlab.spec.remat import remat_obstacles
from shardlab.spec.serving import serving_obstacles
from shardlab.spec.sharding import (
    ACTIVATION_ARRAYS,
    CACHE_ARRAY,
    array_sharding,
    block_of,
    num_ways,
    replicated_kv_heads,
    split_groups,
)

Workload = Literal["train", "prefill", "decode"]
MAX_DEFAULT_SEQ = 4_096
SEQUENCE_AXES = ("seq", "norm_seq", "hop_seq", "kv_seq")  # tokens of the step's own input


class Case(BaseModel):
    """Everything that decides the compiled program. `machine` is the machine as written; resolve it in
    `hardware/`.

    batch: global batch in sequences. seq: tokens per sequence. scan_layers: whether layers are a loop; else
    they are written out one after the other. Serialises to JSON for the compile child process.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    plan: Plan
    model: ModelConfig
    machine: str
    batch: int
    seq: int
    workload: Workload = "train"
    scan_layers: bool = True

    @property
    def subject(self) -> str:
        """What is compiled: the model's name."""
        return self.model.name

    @property
    def work(self) -> tuple[object, ...]:
        """What cases that are compared must share."""
        return (self.model, self.batch, self.seq, self.workload)

    def on(self, machine: str) -> Case:
        """The same case on another machine. Raises UserError when the plan has another number of devices."""
        return self.model_copy(update={"machine": machine_spec(self.plan, machine)})

    @property
    def stacked(self) -> bool:
        """Whether each layer parameter is one stack: a pipeline's are, whatever its layers run as."""
        return self.scan_layers or self.plan.method.pipeline != "none"

    def load_machine(self) -> Machine:
        """The machine as a record."""
        return load_machine(self.machine)

    def parameters(self) -> tuple[ParamSpec, ...]:
        """Every parameter as the step holds it: in a pipeline, layers lie on stages; LoRA's adapters, with
        which a model is trained, come last."""
        stages = layout_of(self.plan, self.model.layers)
        table = parameter_table(self.model, scan_layers=self.scan_layers, stages=stages)
        return table + (adapter_table(table, self.plan.method) if self.workload == "train" else ())

    def obstacles(self) -> dict[str, str]:
        """Why the plan's methods cannot be with this model and workload: reason -> what can."""
        plan = self.plan
        found = obstacles(plan, self.model.layers, self.workload)
        found |= _model_obstacles(plan, self.model) | _locality_obstacles(plan, self.model, self.seq)
        found |= _loss_obstacles(plan, self.seq) if self.workload == "train" else {}
        found |= experts_obstacles(
            self.model, plan.params_in("moe"), plan.activations, plan.method, self.workload
        )
        if self.workload == "train":
            found |= remat_obstacles(plan.method, self.model)
        found |= serving_obstacles(plan.method, self.model, self.seq, self.workload)
        return found | context_obstacles(plan, self.model, self.seq, self.workload)

    def notes(self) -> tuple[str, ...]:
        """What a reader must know of how the rules meet the model: replicated KV heads, straddled groups."""
        heads, kv_heads, axes = self.model.heads, self.model.kv_heads, self.plan.axes
        found = (
            replicated_kv_heads(kv_heads, self.plan.params, axes),
            split_groups(heads, kv_heads, self.plan.params, axes),
            ulysses_kv_note(self.plan, self.model),
        )
        return tuple(note for note in found if note is not None)


def _model_obstacles(plan: Plan, model: ModelConfig) -> dict[str, str]:
    """Parts of models that are not built together."""
    found = {}
    if model.num_experts and (model.post_norms or model.activation != "swiglu"):
        found["experts with norms after them, or of another kind than SwiGLU: not built yet"] = "a dense MLP"
    if model.latent and (model.query_key_norms or model.query_scalar or model.global_rope):
        found["latent attention with norms of heads, or scores or positions of its own: not built yet"] = (
            "grouped queries"
        )
    if model.global_rope and (plan.method.pipeline != "none" or model.dense_layers):
        where = "in a pipeline" if plan.method.pipeline != "none" else "beside dense layers"
        found[f"layers that differ in positions {where}: not built yet"] = "pipeline = 'none'"
    return found


def _loss_obstacles(plan: Plan, seq: int) -> dict[str, str]:
    """Parts of the tokens that are not alike."""
    ways, parts = num_ways(plan.activations.get("seq", ()), plan.axes), plan.method.loss_parts
    if parts == 1 or seq % (ways * parts) == 0:
        return {}
    what = f"loss_parts = {parts} of {seq} tokens" + (f" over {ways} devices" if ways > 1 else "")
    return {what: f"seq a multiple of {ways * parts}"}


def _locality_obstacles(plan: Plan, model: ModelConfig, seq: int) -> dict[str, str]:
    """Where windows and chunks are not built: sequences that are not longer do not need them."""
    local, found = model.locality.within(seq), {}
    if not local:
        return {}
    shorter = f"seq at most {local.tokens}"
    if plan.method.context not in ("none", "ulysses"):
        asked = f"context = {plan.method.context!r} with {local} in {seq} tokens"
        found[f"{asked}: not built yet"] = f"{shorter}, or context = 'ulysses'"
    if model.global_every and plan.method.pipeline != "none":
        asked = f"a pipeline of layers that do and layers that do not see beyond {local}"
        found[f"{asked}: not built yet"] = f"{shorter}, or pipeline = 'none'"
    if model.global_every and model.dense_layers:
        asked = f"{local} in some layers beside dense layers before a mixture of experts"
        found[f"{asked}: not built yet"] = shorter
    return found


def make_case(
    plan: Plan,
    model: str | ModelConfig | None = None,
    machine: str | None = None,
    batch: int | None = None,
    seq: int | None = None,
    workload: Workload | None = None,
    *,
    scan_layers: bool | None = None,
) -> Case:
    """The plan put on a model and a machine; what is not given comes from the plan, then from the defaults.

    Defaults: machine from `on`; scan_layers from `[method]`; model, batch, seq and workload from `[check]`;
    else seq = min(context, 4096) and one sequence per batch shard and microbatch, in training. Raises
    UserError for mistakes (all at once) and Infeasible, with the nearest value that works, when a dimension
    cannot be split as the rules say.
    """
    config, spec = _resolved(plan, model, machine)
    length = _given("--seq", seq, _default_seq(plan, config))
    sequences = _given("--batch", batch, plan.check.batch or default_batch(plan))
    case = Case(
        plan=plan,
        model=config,
        machine=spec,
        batch=sequences,
        seq=length,
        workload=workload or plan.check.workload,
        scan_layers=plan.method.scan_layers if scan_layers is None else scan_layers,
    )
    check_feasible(case)
    return case


def _default_seq(plan: Plan, model: ModelConfig) -> int:
    """What `[check]` says for its own model, which may be longer than that was trained with."""
    if plan.check.seq is not None and plan.check.model == model.name:
        return plan.check.seq
    return min(plan.check.seq or MAX_DEFAULT_SEQ, model.context)


def default_batch(plan: Plan) -> int:
    """One sequence per batch shard and microbatch, in sequences."""
    return num_ways(plan.activations.get("batch", ()), plan.axes) * num_microbatches(plan)


def check_feasible(case: Case) -> None:
    """Raises Infeasible, with every reason, when an array cannot be split as the rules say."""
    found = case.obstacles()
    arrays = [] if found else list(_arrays(case))
    for array in arrays:
        shape, axes, rules, what = array
        try:
            array_sharding(shape, axes, rules, case.plan.axes, what=what)
        except Infeasible as error:
            # Many arrays share a dimension: one reason each, named after the first array.
            nearest = nearest_size(array, arrays, case.plan.axes) or error.nearest
            found.setdefault(error.reason.rpartition(" in ")[0] or error.reason, nearest)
    _check_sizes(case, found)
    if found:
        raise Infeasible("; ".join(found), "; ".join(dict.fromkeys(filter(None, found.values()))))


def _check_sizes(case: Case, found: dict[str, str]) -> None:
    count, context = num_microbatches(case.plan), case.model.context
    split = case.plan.activations.get("batch", ())
    step = count * num_ways(split, case.plan.axes)
    if case.workload == "train" and count > 1 and case.batch % step:
        over = f" over {step // count} devices ({' x '.join(split)})" if step > count else ""
        below, above = case.batch // step * step, -(-case.batch // step) * step
        near = f"nearest batch that divides: {f'{below} or {above}' if below else above}"
        found[f"{case.batch} sequences in {count} microbatches{over}"] = near
    if case.seq > context and case.model.positions == "learned":
        reason = f"{case.seq} tokens with {context} learned positions ({case.model.name})"
        found[reason] = f"seq at most {context}"


def _arrays(case: Case) -> Iterator[Array]:
    """Every array that the rules split: parameters, their optimizer state, the key activations."""
    train = case.workload == "train"
    for spec in case.parameters():
        block = block_of(spec.path)
        yield spec.shape, spec.axes, case.plan.params_in(block), spec.path
        if train:
            yield (
                spec.shape,
                spec.axes,
                case.plan.optimizer_in(block),
                f"optimizer state of {spec.path}",
            )
    extents = _extents(case)
    for what, axes in _activations(case):
        shape = tuple(extents[axis] if axis is not None else 1 for axis in axes)
        yield shape, axes, case.plan.activations, what


def _activations(case: Case) -> Iterator[tuple[str, tuple[str | None, ...]]]:
    """The key activations. A decode step has a cache, and one token per sequence, which no rule splits."""
    decode, one = case.workload == "decode", case.plan.method.chunk == 1
    for what, axes in ACTIVATION_ARRAYS.items():
        yield what, tuple(None if decode and one and axis in SEQUENCE_AXES else axis for axis in axes)
    if decode:
        yield "KV cache", CACHE_ARRAY


def _extents(case: Case) -> dict[str, int]:
    """How long each logical axis of the activations is, in one microbatch."""
    model, steps = case.model, num_microbatches(case.plan) if case.workload == "train" else 1
    batch = case.plan.activations.get("batch", ())
    return {
        # What does not divide is reported as a batch that does not divide into microbatches.
        "batch": case.batch if steps == 1 else num_ways(batch, case.plan.axes),
        **dict.fromkeys(SEQUENCE_AXES, case.plan.method.chunk if case.workload == "decode" else case.seq),
        "cache": case.seq,
        "embed": model.embed,
        "heads": model.heads,
        "kv_heads": model.kv_heads,
        "mlp": model.mlp,
        "vocab": model.padded_vocab,
    }


def _resolved(plan: Plan, model: str | ModelConfig | None, machine: str | None) -> tuple[ModelConfig, str]:
    """The model and the machine; every mistake of the two at once."""
    problems: list[Problem] = []
    config, spec = None, None
    try:
        config = _config(plan, model)
    except UserError as error:
        problems += error.problems
    try:
        spec = machine_spec(plan, machine)
    except UserError as error:
        problems += error.problems
    if config is None or spec is None:
        raise UserError(*problems)
    return config, spec


def _config(plan: Plan, model: str | ModelConfig | None) -> ModelConfig:
    if isinstance(model, ModelConfig):
        return model
    name = model or plan.check.model
    if name is None:
        raise UserError(
            Problem(plan.path or plan.name, "no model", "give --model, or [check] model in the plan")
        )
    return find_model(name)


def machine_spec(plan: Plan, machine: str | None) -> str:
    """The machine as written, with as many devices as the plan has."""
    spec = machine or plan.on
    if spec is None:
        raise UserError(Problem(plan.path or plan.name, "no machine", "give --on, or on = … in the plan"))
    grid, product = grid_size(plan.axes)
    if spec == "attached":
        return f"attached:{product}"
    devices = load_machine(spec).num_devices
    if devices != product:
        what = f"the plan has {grid} devices, but {spec} has {devices}"
        fix = f"choose a machine with {product} devices, or another plan"
        raise UserError(Problem(plan.path or plan.name, what, fix))
    return spec


def _given(flag: str, value: int | None, default: int) -> int:
    """The number the user gave, which must be at least 1, or the plan's."""
    if value is not None and value < 1:
        raise UserError(Problem(flag, f"{value}", "use 1 or more"))
    return default if value is None else value
