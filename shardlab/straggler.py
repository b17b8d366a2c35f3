"""What one slow device costs: the step again, its compute stretched and all others waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shardlab.analysis import Attributed
from shardlab.cost.compute_time import ATTENTION_KERNEL
from shardlab.cost.instructions import StepCost
from shardlab.hardware.machine import Machine
from shardlab.prediction import Prediction, predict, predictions_together


@dataclass(frozen=True, slots=True, kw_only=True)
class Straggler:
    """Which device is slow, and the step then. devices: of its kind, by flattened id as `0-3,8`, empty where
    all devices do the same; step_time_s: seconds."""

    devices: str
    step_time_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Stragglers:
    """slowdown: how many times as long the slow device's compute takes. step_time_s: seconds, of even
    devices. slow: one per kind of device (stage of a pipeline), in their order."""

    slowdown: float
    step_time_s: float
    slow: tuple[Straggler, ...]

    def to_json(self) -> dict[str, object]:
        """The member `straggler` of `explain --json`."""
        slow = [{"devices": one.devices, "step_time_s": one.step_time_s} for one in self.slow]
        return {"slowdown": self.slowdown, "step_time_s": self.step_time_s, "slow": slow}


def stragglers(
    parts: Sequence[Attributed],
    costs: Sequence[StepCost],
    machine: Machine,
    slowdown: float,
    *,
    attention_kernel: str = ATTENTION_KERNEL,
) -> Stragglers | None:
    """The step with one slow device of each kind in turn; None where the step time is not known."""

    def step(factor: float, kind: int) -> Prediction | None:
        found = []
        for part, cost in zip(parts, costs, strict=True):
            # A program whose devices all do the same has one kind, whichever of its devices is slow.
            slow_kind = kind if kind in part.graph.schedule.kinds else 0
            one = predict(
                part,
                cost,
                machine,
                slowdown=factor,
                slow_kind=slow_kind,
                attention_kernel=attention_kernel,
            )
            found.append((part.module.name, part.runs_per_step, one))
        return predictions_together(found)

    even = step(1.0, 0)
    if even is None or even.timeline.step_time_s is None:
        return None
    kinds = sorted({kind for part in parts for kind in part.graph.schedule.kinds}) or [0]
    slow = []
    for at, kind in enumerate(kinds):
        found = step(slowdown, kind)
        assert found is not None and found.timeline.step_time_s is not None
        devices = even.devices[at] if at < len(even.devices) else ""
        slow.append(Straggler(devices=devices, step_time_s=found.timeline.step_time_s))
    return Stragglers(slowdown=slowdown, step_time_s=even.timeline.step_time_s, slow=tuple(slow))
