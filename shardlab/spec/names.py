"""What a plan is called in the literature, derived from its rules: shown in reports, never a second truth."""

from __future__ import annotations

from collections.abc import Iterable

from shardlab.spec.experts import expert_axes
from shardlab.spec.plan import Plan, Rules

SCHEDULES = {
    "none": "no schedule",
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "interleaved": "interleaved 1F1B",
    "zb-h1": "ZB-H1",
}


CONTEXTS = {
    "none": "context parallel",
    "all-gather": "context parallel (all-gather)",
    "ring": "context parallel (ring)",
    "ulysses": "context parallel (Ulysses)",
    "ring+ulysses": "context parallel (ring x Ulysses)",
}


def strategy_names(plan: Plan) -> tuple[str, ...]:
    """The strategies that the rules amount to, such as ("FSDP", "tensor parallel", "sequence parallel
    (Megatron)").

    Mesh axes of size 1 do nothing and name nothing; an axis that no rule uses repeats the work, and is named
    so. Definitions: FSDP, arXiv:2304.11277 (HSDP is its hybrid sharding); ZeRO, arXiv:1910.02054; tensor
    parallel, arXiv:1909.08053; 2-D, arXiv:2211.05102, section 3.2.2; sequence parallel, arXiv:2205.05198;
    pipelines: see `spec/schedule.py`.
    """
    if plan.num_devices == 1:
        return ("single device",)
    lora = () if plan.method.lora is None else (f"LoRA (rank {plan.method.lora})",)
    return (*_data_names(plan), *_model_names(plan), *_other_names(plan), *lora)


def reduced_once(plan: Plan) -> tuple[str, ...]:
    """The axes of batch and context over which gradients are reduced once a step, after the last microbatch.

    Those that split neither parameters nor the sums of gradients: over the others (FSDP, ZeRO-2) every
    microbatch's gradients are scattered at once, which is what sharding them saves memory by. Of two axes of
    context parallelism both or none.
    """
    kept = {*_used(plan.all_params), *_used(plan.gradients)}
    batch, context = plan.activations.get("batch", ()), context_split(plan)
    return (*(axis for axis in batch if axis not in kept), *(context if kept.isdisjoint(context) else ()))


def context_split(plan: Plan) -> tuple[str, ...]:
    """The mesh axes of context parallelism."""
    return tuple(plan.activations.get("seq", ())) if plan.method.context != "none" else ()


def reduced_each(plan: Plan) -> tuple[str, ...]:
    """The axes of batch and context over which gradients are reduced for every microbatch."""
    tokens = (*plan.activations.get("batch", ()), *context_split(plan))
    return tuple(axis for axis in _live(plan, tokens) if axis not in reduced_once(plan))


def accumulation_notes(plan: Plan) -> tuple[str, ...]:
    """What a report says about gradient accumulation: when gradients are reduced over which axes."""
    count = plan.method.accumulate
    each, once = reduced_each(plan), _live(plan, reduced_once(plan))
    if count == 1 or not (each or once):
        return ()
    said = [f"once per step over {', '.join(once)}"] if once else []
    if each:
        said.append(
            f"once per microbatch over {', '.join(each)}, whose sums are sharded (whole sums would need the "
            "memory that sharding saves)"
        )
    return (f"accumulate = {count}: gradients are reduced {', and '.join(said)}",)


def _data_names(plan: Plan) -> Iterable[str]:
    """What the batch axes do: an axis that splits weights too is FSDP, one that does not is data parallel.

    An axis that splits the sequence holds other tokens on every device: what it does to weights has the same
    names.
    """
    batch = _live(plan, plan.activations.get("batch", ()))
    tokens = _live(plan, plan.activations.get("seq", ()))
    weights, states = _used(_without_experts(plan)), _used(plan.all_optimizer)
    sharded = [axis for axis in (*batch, *tokens) if axis in weights]
    replicated = [axis for axis in batch if axis not in weights]
    if sharded and replicated:
        yield "HSDP"
    elif sharded:
        yield "FSDP"
    elif replicated:
        yield "data parallel"
    replicated += [axis for axis in tokens if axis not in weights]
    split = [a for a in replicated if a in states and a not in plan.params_in("moe").get("expert", ())]
    if split:
        yield "ZeRO-2" if any(axis in _used(plan.gradients) for axis in split) else "ZeRO-1"
    if plan.method.accumulate > 1:
        yield f"gradient accumulation ({plan.method.accumulate} microbatches)"


def _model_names(plan: Plan) -> Iterable[str]:
    """What the other axes do to weights and to the sequence."""
    batch = plan.activations.get("batch", ())
    layers, stages = plan.params.get("layers", ()), plan.params.get("stage", ())
    sequence = _live(plan, plan.activations.get("seq", ()))
    others = (*batch, *layers, *stages, *sequence)
    tensor = [a for a in _used(_without_experts(plan)) if a not in others]
    norms = _live(plan, plan.activations.get("norm_seq", ()))
    if _live(plan, tensor):
        both = {bool(_live(plan, [axis])) and axis in plan.activations.get("embed", ()) for axis in tensor}
        yield "2-D tensor parallel" if len(both) == 2 else "tensor parallel"
    if any(axis in tensor for axis in norms):
        yield "sequence parallel (Megatron)"
    if sequence:
        yield CONTEXTS[plan.method.context]
    if _live(plan, expert_axes(plan.params_in("moe"), plan.activations)):
        yield "expert parallel"
    if any(axis not in batch for axis in _live(plan, layers)):
        yield "layers sharded"
    if _live(plan, stages):
        yield f"pipeline parallel ({SCHEDULES[plan.method.pipeline]})"


def _other_names(plan: Plan) -> Iterable[str]:
    """Axes that have no name in the literature, and those that do nothing."""
    named = {*plan.activations.get("batch", ()), *plan.activations.get("seq", ()), *_used(plan.all_params)}
    activations, states = _used(plan.activations), _used(plan.all_optimizer)
    for axis in _live(plan, plan.axes):
        if axis in named:
            continue
        what = "activations split" if axis in activations else "optimizer state split"
        yield f"{what if axis in activations or axis in states else 'replicated'} over {axis}"


def _without_experts(plan: Plan) -> Rules:
    """The rules of parameters, of experts only those mesh axes over which they are gathered for use."""
    owned = expert_axes(plan.params_in("moe"), plan.activations)
    gathered = tuple(axis for axis in plan.params_in("moe").get("expert", ()) if axis not in owned)
    return {**plan.all_params, "expert": gathered}


def _live(plan: Plan, axes: Iterable[str]) -> list[str]:
    return [axis for axis in axes if plan.axes[axis] > 1]


def _used(rules: Rules) -> list[str]:
    """The mesh axes that these rules name, each once."""
    return list(dict.fromkeys(axis for split in rules.values() for axis in split))
