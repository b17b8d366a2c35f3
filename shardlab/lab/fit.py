"""What fits on a machine: the largest batch, the longest sequence, and what each change buys in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TextIO

from shardlab.capacity import Fit, FitRow, needed_bytes
from shardlab.case_report import CaseReport, unanswered
from shardlab.compile import compile_case
from shardlab.compile.fit import Try, batch_unit, largest_batch
from shardlab.cost.memory import memory_limit
from shardlab.errors import Infeasible, Problem, UserError
from shardlab.hardware.catalog import load_machine
from shardlab.lab.cases import Question
from shardlab.lab.progress import Progress, progress_on
from shardlab.lab.run import Steps, run_cases
from shardlab.spec.candidates import candidates, state_bytes
from shardlab.spec.case import Case, make_case
from shardlab.spec.models import find_model
from shardlab.spec.plan import load_plan
from shardlab.units import format_bytes

REMATS = ("none", "matmuls", "full")  # from most memory to least
SEQ_UNIT = 128  # tokens: what the fused attention kernels take
MAX_TRIES = 6


def fit_model(
    question: Question, plan_path: str | None = None, *, progress: TextIO, steps: Steps | None = None
) -> Fit:
    """Try rematerialisation policies, then the largest batch and the longest sequence with the one that needs
    least, and other grids of the same devices where none fits as asked.

    The plan: a mesh file, else FSDP over all devices without rematerialisation. Raises UserError for
    mistakes in flags and in the file, and Infeasible when the plan cannot be put on the model.
    """
    plan = load_plan(plan_path) if plan_path is not None else None
    spec = question.machines[0] if question.machines else plan.on if plan is not None else None
    if spec is None:
        raise UserError(Problem("--on", "no machine", "give --on MACHINE"))
    name = question.model or (plan.check.model if plan is not None else None)
    if name is None:
        raise UserError(Problem("--model", "no model", "give --model NAME"))
    machine, config = load_machine(spec), find_model(name)
    if memory_limit(machine)[0] is None:
        raise UserError(Problem("--on", f"{spec} has no memory limit", "choose a machine with known chips"))
    plan = plan or candidates(config, machine, REMATS[0])[0].plan
    base = make_case(plan, config, spec, question.batch, question.seq, question.workload)
    steps = steps or Steps(compile=partial(compile_case, find_largest_batch=False))
    with progress_on(progress, 0) as reporter:
        return _Fitting(base, steps, reporter).answer()


class _Fitting:
    """The search itself. Every case is compiled once."""

    def __init__(self, base: Case, steps: Steps, progress: Progress) -> None:
        self.base, self.steps, self.progress = base, steps, progress
        limit = memory_limit(base.load_machine())[0]
        assert limit is not None
        self.limit = limit
        self.known: dict[str, CaseReport] = {}

    def answer(self) -> Fit:
        cases = self._remats()
        self._compile([case for _, case in cases])
        rows = [self._row(change, case) for change, case in cases]
        fitting = [row for row in rows if row.fits]
        chosen = cases[-1][1]  # the one that needs least
        unit = batch_unit(chosen)
        batch = self._largest(partial(self._with, chosen, "batch"), unit, None)
        shortest = chosen.model_copy(update={"batch": unit})
        seq = self._largest(partial(self._with, shortest, "seq"), self._seq_unit(), chosen.model.context)
        others = list(self._grids(chosen)) if not fitting else []
        self._compile([case for _, case in others])
        rows += [self._row(change, case) for change, case in others]
        first = rows[0].needed_bytes
        return Fit(
            rows=tuple(replace(row, saved_bytes=_less(first, row.needed_bytes)) for row in rows),
            remat=str(chosen.plan.method.remat) if batch is not None else None,
            largest_batch=batch,
            longest_seq=seq,
            advice=tuple(self._advice(rows, batch)),
        )

    def _remats(self) -> list[tuple[str, Case]]:
        """The base with each policy, its own first; a pipeline has one, and inference none."""
        own = self.base.plan.method.remat
        if self.base.workload != "train" or self.base.plan.method.pipeline != "none":
            return [("as asked", self.base)]
        after = REMATS[REMATS.index(own) + 1 :] if own in REMATS else REMATS
        return [("as asked", self.base), *((f"remat = {r}", self._with_remat(self.base, r)) for r in after)]

    def _with_remat(self, case: Case, remat: str) -> Case:
        method = case.plan.method.model_copy(update={"remat": remat})
        return case.model_copy(update={"plan": case.plan.model_copy(update={"method": method})})

    def _with(self, case: Case, key: str, value: int) -> Case:
        return case.model_copy(update={key: value})

    def _seq_unit(self) -> int:
        """Tokens that every rule and kernel can split."""
        sizes = self.base.plan.axes
        ways = [sizes[a] for key in ("seq", "norm_seq") for a in self.base.plan.activations.get(key, ())]
        return SEQ_UNIT * max([1, *ways])

    def _grids(self, chosen: Case) -> Iterator[tuple[str, Case]]:
        """Other grids of the same devices with the same rematerialisation, those whose state alone fits."""
        remat = next((word for word in REMATS if word == chosen.plan.method.remat), "full")
        for other in candidates(chosen.model, chosen.load_machine(), remat):
            if other.plan.axes == chosen.plan.axes:
                continue
            try:
                case = make_case(
                    other.plan, chosen.model, chosen.machine, chosen.batch, chosen.seq, chosen.workload
                )
                if chosen.workload != "train" or state_bytes(case) <= self.limit:
                    yield f"grid {other.plan.name}", case
            except Infeasible:
                continue

    def _largest(self, case_of: Callable[[int], Case], unit: int, most: int | None) -> int | None:
        """The largest multiple of `unit` that fits, at most `most`; None when not even one unit does."""

        def attempt(value: int) -> Try:
            report = self._report(case_of(value))
            needed = needed_bytes(report)
            fits = report.memory is not None and report.memory.fits != "no" and needed is not None
            return Try(batch=value, fits=fits, needed_bytes=needed or self.limit + 1)

        low = attempt(unit)
        if not low.fits:
            return None
        high = low
        while high.fits:  # from the line through the last two, or by doubling
            if most is not None and high.batch >= most:
                return high.batch
            low, value = high, self._beyond(low, high, unit)
            high = attempt(min(value, most // unit * unit) if most is not None else value)
        found = largest_batch(unit, high, self.limit, attempt, MAX_TRIES)
        return max(found or low.batch, low.batch)

    def _beyond(self, low: Try, high: Try, unit: int) -> int:
        """A value that should not fit any more: one unit above where the line meets the limit, else twice."""
        if high.batch == low.batch or high.needed_bytes <= low.needed_bytes:
            return 2 * high.batch
        slope = (high.needed_bytes - low.needed_bytes) / (high.batch - low.batch)
        meets = high.batch + (self.limit - high.needed_bytes) / slope
        return max(int(meets / unit) + 1, high.batch // unit + 1) * unit

    def _compile(self, cases: Sequence[Case]) -> None:
        """All at once, so that they run side by side."""
        wanted = [case for case in cases if self.steps.key(case) not in self.known]
        for case, report in zip(wanted, run_cases(wanted, None, self.progress, self.steps), strict=True):
            self.known[self.steps.key(case)] = report

    def _report(self, case: Case) -> CaseReport:
        try:
            make_case(case.plan, case.model, case.machine, case.batch, case.seq, case.workload)
        except Infeasible as error:
            return unanswered(case, infeasible="; ".join(str(error).splitlines()))
        self._compile([case])
        return self.known[self.steps.key(case)]

    def _row(self, change: str, case: Case) -> FitRow:
        return FitRow(change=change, report=self._report(case))

    def _advice(self, rows: Sequence[FitRow], batch: int | None) -> Iterator[str]:
        """What to do when the base does not fit."""
        if rows[0].fits:
            return
        if batch is not None:
            return
        fitting = [row.change for row in rows if row.fits]
        if fitting:
            yield f"fits with {fitting[0]}"
            return
        needed = min((row.needed_bytes for row in rows if row.needed_bytes is not None), default=None)
        if needed is not None:
            yield (
                f"the least that was tried needs {format_bytes(needed)} of {format_bytes(self.limit)}: "
                f"{-(-needed // self.limit)} times the devices would hold it if all of it were split"
            )
        if self.base.workload == "train":
            state = state_bytes(self.base)
            yield f"parameters and optimizer state alone are {format_bytes(state)} per device"


def _less(first: int | None, now: int | None) -> int | None:
    return None if first is None or now is None else first - now
