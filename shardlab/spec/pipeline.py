"""What a plan's pipeline means for a model: which layers each stage holds, and whether that can be."""

from __future__ import annotations

from functools import lru_cache

from shardlab.spec.plan import Plan
from shardlab.spec.schedule import Schedule, make_schedule
from shardlab.spec.stages import StageLayout, split_layers


def stage_axis(plan: Plan) -> str | None:
    """The mesh axis of the stages, None when the plan has no pipeline."""
    return next(iter(plan.params.get("stage", ())), None) if plan.method.pipeline != "none" else None


def virtual_stages(plan: Plan) -> int:
    """Chunks of layers per stage."""
    return plan.method.virtual_stages or 1


def layout_of(plan: Plan, layers: int) -> StageLayout | None:
    """How `layers` lie on the plan's stages, None without a pipeline. Call where there is no obstacle."""
    axis = stage_axis(plan)
    if axis is None:
        return None
    stages, virtual = plan.axes[axis], virtual_stages(plan)
    return StageLayout(stages=stages, virtual=virtual, counts=split_layers(layers, stages * virtual))


@lru_cache(maxsize=16)
def _schedule(name: str, stages: int, microbatches: int, virtual: int) -> Schedule:
    return make_schedule(name, stages, microbatches, virtual)


def schedule_of(plan: Plan) -> Schedule:
    """The schedule of a plan that has a pipeline."""
    axis, microbatches = stage_axis(plan), plan.method.microbatches
    assert axis is not None and microbatches is not None
    return _schedule(plan.method.pipeline, plan.axes[axis], microbatches, virtual_stages(plan))


def num_microbatches(plan: Plan) -> int:
    """Into how many parts the batch of a training step is cut."""
    return plan.method.microbatches or plan.method.accumulate


def pipeline_notes(plan: Plan) -> tuple[str, ...]:
    """What the report says about the plan's pipeline."""
    if stage_axis(plan) is None:
        return ()
    schedule, name = schedule_of(plan), plan.method.pipeline
    found = [f"{name}: {len(schedule.rows)} ticks, {schedule.bubble} of all stages' ticks idle (bubble)"]
    batch = plan.activations.get("batch", ())
    sharded = [axis for axis in batch if any(axis in names for names in plan.params.values())]
    if sharded:
        how_often = f"for each of {schedule.microbatches} microbatches"
        found.append(f"weights are gathered, and gradients reduced, over {' and '.join(sharded)} {how_often}")
    if name == "interleaved":
        found.append(
            "interleaved: stages pass values in a ring and so keep in step, and a tick lasts as long as its "
            "longest item; 1f1b and zb-h1 do not wait so"
        )
    return tuple(found)


def obstacles(plan: Plan, layers: int, workload: str) -> dict[str, str]:
    """Why the plan's pipeline cannot be: reason -> the nearest that can. Empty when it can."""
    axis, method = stage_axis(plan), plan.method
    if method.pipeline == "none":
        return {}
    if axis is None:
        return {f"a pipeline ({method.pipeline}) without stages": 'write stage = ["stage"] in [params]'}
    stages, virtual = plan.axes[axis], virtual_stages(plan)
    found: dict[str, str] = {}
    if workload != "train":
        found[f"a pipeline ({method.pipeline}) for {workload}"] = "pipelines train: use pipeline = 'none'"
    if layers < stages * virtual:
        chunks = f"{stages} stages" + (f" of {virtual} virtual stages" if virtual > 1 else "")
        found[f"{layers} layers over {chunks} ({axis})"] = _fewer(layers, stages)
    if method.pipeline == "interleaved" and virtual < 2:
        found["an interleaved pipeline with one chunk per stage"] = _fewer(layers, stages)
    return found | _microbatch_obstacles(plan, stages)


def _fewer(layers: int, stages: int) -> str:
    """What these layers can have, nearest to what was asked."""
    if stages > layers:
        return f"at most {layers} stages"
    virtual = layers // stages
    return f"virtual_stages at most {virtual}" if virtual > 1 else "pipeline = '1f1b', without virtual_stages"


def _microbatch_obstacles(plan: Plan, stages: int) -> dict[str, str]:
    """What is wrong with the number of microbatches."""
    count, name = plan.method.microbatches, plan.method.pipeline
    if count is None:
        return {f"a schedule ({name}) without microbatches": f"microbatches = {stages} or more"}
    if name == "interleaved" and count % stages:
        below, above = count // stages * stages, -(-count // stages) * stages
        near = f"{below} or {above}" if below else str(above)
        return {f"{count} microbatches interleaved over {stages} stages": f"nearest microbatches: {near}"}
    return {}
