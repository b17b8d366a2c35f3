"""One step as the backend runs it: a compute stream, communication streams, and who waits for whom.

The scheduled program is walked in its own order. A synchronous collective holds up the compute stream; an
asynchronous one runs beside it from its start to its done, on its stream: of a GPU one for NCCL collectives
and one for point-to-point transfers; of a TPU one for each set of mesh axes and one for DCN. Copies that are
started and awaited (DMA) have a stream too, and those to and from the host's memory one each. Transfers that
share a tier share its rate (`cost/flows.py`). A loop is one iteration from a quiet start, as often as it
runs; what is under way when it begins goes on beside it. A loop over the ticks of a pipeline is walked tick
by tick on every stage (`cost/stages.py`). What a computation leaves under way is awaited at its end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shardlab.attribute.calls import CallGraph
from shardlab.cost.blocks import Block, PathEntry
from shardlab.cost.stages import FreeStages
from shardlab.cost.walk import Kernel, Place, Transfer, Walk
from shardlab.hlo.module import Module


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTime:
    """One kind of device, a stage of a pipeline. Seconds; waited_s: for other stages, the bubble."""

    kind: int
    step_time_s: float
    compute_s: float
    exposed_communication_s: float
    waited_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """One step of the device that ends last. Seconds.

    step_time_s: None where a part is unknown, whose names `unknown` lists. communication_s: while at least
    one collective is under way; exposed_communication_s: the part of it in which nothing is computed.
    critical_path: what the step waits for, largest first; it adds up to the step. root: the events. stages:
    of every kind of device, where there are several.
    """

    step_time_s: float | None
    compute_s: float | None
    communication_s: float | None
    exposed_communication_s: float | None
    critical_path: tuple[PathEntry, ...]
    root: Block
    unknown: tuple[str, ...] = ()
    stages: tuple[StageTime, ...] = ()


def simulate(
    module: Module,
    graph: CallGraph,
    kernels: Mapping[Place, Kernel],
    transfers: Mapping[Place, tuple[Transfer, ...]],
    *,
    slowdown: float = 1.0,
    slow_kind: int = 0,
    unknown: Sequence[str] = (),
    free: FreeStages | None = None,
    crowds: Mapping[int, Sequence[int]] | None = None,
) -> Timeline:
    """The timeline of a scheduled module.

    kernels, transfers: by the computation and the instruction that the schedule has. slowdown: of the compute
    of one device of this kind (of `graph.schedule.kinds`), the straggler that all others wait for. unknown:
    names of what is neither a kernel nor a transfer and takes its time all the same. free: where stages run
    free, instead of in one program. crowds: kinds of the devices on the core of each kind, where they share.
    Raises ValueError for a module without a schedule.
    """
    if not module.is_scheduled:
        raise ValueError(f"module {module.name} is not scheduled")
    walk = Walk(module, graph, kernels, transfers, slowdown, slow_kind, free, crowds or {})
    roots = {kind: walk.on_kind(kind) for kind in walk.kinds}
    root = max(roots.values(), key=lambda block: (block.duration_s, block.compute_s))
    missing = tuple(dict.fromkeys((*unknown, *walk.unknown)))
    known = not missing
    return Timeline(
        step_time_s=root.duration_s if known else None,
        compute_s=root.compute_s if known else None,
        communication_s=root.communication_s if known else None,
        exposed_communication_s=root.exposed_s if known else None,
        critical_path=tuple(sorted(root.path, key=lambda entry: -entry.time_s)) if known else (),
        root=root,
        unknown=missing,
        stages=tuple(map(_stage_time, roots.items())) if known and len(roots) > 1 else (),
    )


def _stage_time(of: tuple[int, Block]) -> StageTime:
    kind, block = of
    return StageTime(
        kind=kind,
        step_time_s=block.duration_s,
        compute_s=block.compute_s,
        exposed_communication_s=block.exposed_s,
        waited_s=block.waited_s,
    )
