"""What the links and the cores do beside a run of the wire lab, whatever the run itself takes.

Before and after it a plain stream, one way and both ways at once, and on every core a step of one device of
the run's own model: a mixture's masks and transposed copies are slower than other loops.
Where the stream has not the rate, or the cores have changed, other work holds them: the run is done again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from itertools import islice
from types import TracebackType
from typing import TypeVar

from sites import EFFICIENCY, on_core
from wire_cores import OneDeviceStep, StepRates

from shardlab.errors import Problem, UserError

QUIET_SHARE = 0.95 * EFFICIENCY  # of a link's rate
STEADY = 0.1  # of a run's own step, by which the step of one device may change
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """link_share: what a stream had of the rate, the least; before and after: the cores; run_step_s: what a
    step of the run took, to which a change of theirs is much or little."""

    link_share: float
    before: StepRates
    after: StepRates
    run_step_s: float

    @property
    def cores(self) -> StepRates:
        """Of both, by their times."""
        one, other = asdict(self.before), asdict(self.after)
        rates = {name: 2 / (1 / one[name] + 1 / other[name]) for name in one if name != "step_s"}
        return StepRates(step_s=(self.before.step_s + self.after.step_s) / 2, **rates)

    @property
    def cores_change(self) -> float:
        """By how much the step of one device changed, as a share of the run's."""
        return abs(self.after.step_s - self.before.step_s) / self.run_step_s

    @property
    def quietness(self) -> float:
        """1 and more: links and cores were left alone."""
        return min(self.link_share / QUIET_SHARE, STEADY / max(self.cores_change, STEADY))


def first_quiet(runs: Iterator[tuple[_T, Beside | None]], tries: int) -> tuple[_T, Beside | None]:
    """The first run that was left alone, or of so many the one that was most.

    runs: what each measured, which plays no part, and what was beside it; None where that does not matter.
    """
    found: list[tuple[float, tuple[_T, Beside | None]]] = []
    for one in islice(runs, tries):
        found.append((1.0 if one[1] is None else one[1].quietness, one))
        if found[-1][0] >= 1:
            break
    return max(found, key=lambda pair: pair[0])[1]


class CoreControl:
    """A process on every core, which takes nothing of it until it is asked."""

    def __enter__(self) -> CoreControl:
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        self._running = [
            subprocess.Popen(
                on_core(index, [sys.executable, __file__]),
                env=environment,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for index in range(os.cpu_count() or 1)
        ]
        try:
            self.rates("data")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def rates(self, plan: str) -> StepRates:
        """Of this plan on one device, all cores at once; as many times what the slowest gets, since a step
        waits for it.

        Raises UserError when one of the processes has ended.
        """
        for process in self._running:
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # it has ended: it gives no line
                process.stdin.write(f"{plan}\n")
                process.stdin.flush()
        lines = [process.stdout.readline() for process in self._running if process.stdout is not None]
        if not all(lines):
            core = lines.index("")
            raise UserError(
                Problem(f"core {core}", "its control ended", "see what it said; pip install '.[train]'")
            )
        told = [json.loads(line) for line in lines]
        slowest = max(told, key=lambda one: one["step_s"])
        return StepRates(
            **{name: value * (1 if name == "step_s" else len(told)) for name, value in slowest.items()}
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._running:
            process.kill()
            process.communicate()


def main() -> None:
    """For every line that comes, a plan's name, say what its step takes; each is compiled once."""
    compiled = cache(OneDeviceStep)
    for line in sys.stdin:
        print(json.dumps(asdict(compiled(line.strip()).rates())), flush=True)


if __name__ == "__main__":
    main()
