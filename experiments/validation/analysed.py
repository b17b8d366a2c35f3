"""A row's program, read once, and its step at any efficiency of the chip."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache

from shardlab.analysis import Attributed, attribute
from shardlab.cost.instructions import StepCost, step_cost
from shardlab.cost.stages import FreeStages
from shardlab.cost.timeline import Timeline
from shardlab.errors import ShardlabError
from shardlab.hardware.catalog import load_machine
from shardlab.prediction import free_stages_of, predict
from shardlab.program import Program
from shardlab.spec.pipeline import schedule_of, stage_axis
from shardlab.spec.schedule import make_schedule
from shardlab.units import format_bytes
from validation.data_ways import with_data_ways
from validation.efficiency import at_efficiency
from validation.row import Row
from validation.substitution import with_counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysed:
    """What does not depend on how fast the chip is."""

    row: Row
    part: Attributed
    cost: StepCost

    def timeline(self, efficiency: float = 1.0) -> Timeline | str:
        """The step of the row, or why there is none."""
        assert self.row.case is not None
        machine = at_efficiency(load_machine(self.row.case.machine), efficiency)
        predicted = predict(
            self.part,
            self.cost,
            machine,
            attention_kernel=self.row.attention_kernel,
            in_pieces_over=self.row.in_pieces_over,
            free=self._free(),
        )
        if predicted is None:
            return "no step time: nothing is known of the machine"
        line = predicted.timeline
        return line if line.step_time_s is not None else f"no step time: {', '.join(line.unknown[:3])}"

    def _free(self) -> FreeStages | None:
        """How the row's stages wait for each other, where they ran free."""
        row, case = self.row, self.row.case
        axis = stage_axis(case.plan) if row.free_stages and case is not None else None
        if case is None or axis is None:
            return None
        schedule = schedule_of(case.plan)
        if row.counts is not None:
            schedule = make_schedule(schedule.name, schedule.stages, row.counts.microbatches)
        free = free_stages_of(self.part, schedule, axis)
        assert free is not None
        return free


def analysed(row: Row, program: Program) -> Analysed | str:
    """The row's program, with the row's counts, or why it cannot be read."""
    assert row.case is not None
    if (refusal := program.refusal) is not None:
        sizes = f"{format_bytes(refusal.needed_bytes)} of {format_bytes(refusal.limit_bytes)}"
        return f"the compiler refuses it: {sizes}"
    try:
        text = program.hlo_text if row.counts is None else with_counts(program.hlo_text, row.counts)
        part, cost = _read(_Text(text, program), row.case.machine)
        if row.counts is not None and row.counts.data is not None:
            part = with_data_ways(part, row.counts.data, load_machine(row.counts.machine))
        return Analysed(row=row, part=part, cost=cost)
    except (ShardlabError, ValueError) as error:
        return f"not analysed: {error}"


@dataclass(frozen=True, slots=True)
class _Text:
    """A program, known by its text."""

    text: str
    program: Program = field(compare=False)


@lru_cache(maxsize=8)
def _read(of: _Text, machine: str) -> tuple[Attributed, StepCost]:
    """Rows that differ in their ways of data parallelism alone are read once, if they come one after the
    other."""
    program = replace(of.program, hlo_text=of.text)
    (part,) = attribute(program, machine=load_machine(machine))
    return part, step_cost(part.module, program.backend)
