"""The wire lab: run plans over real links between network namespaces, and hold the predictions against them.

sudo python experiments/wire_lab.py --sites=2,4 --devices=1,2 --rates=100 --csv=wire.csv --plot=wire.svg
python experiments/wire_lab.py --measured=wire.csv --csv=again.csv    # predict anew what was measured

Needs Linux, root, iproute2 and the [train] extra. A site is a network namespace with one process of
`train.py`; its link is shaped with `tc tbf`. Every plan is first compiled and analysed as `shardlab explain
--on=experiments/lab.toml:2x1` does it; then it runs, and interface counters are read before and after each
step. Bytes are TCP payload, frames less 66 bytes of headers each, which `wire_calibrate.py` checks with a
plain TCP stream through the same links. What joining and compiling send, and what an idle run does, is
counted apart, and so is the loopback interface between the devices of one site.

Before and after each run a plain stream is sent, and a step of one device timed on every core
(`wire_control.py`). The predicted step is that of a machine with `lab.toml`'s links at the row's rate, and
cores as they were then: on a shared computer they are half as fast in one hour as in another. Where the
stream does not have the rate, or the cores changed, the run is done again (up to --tries).
"""

from __future__ import annotations

import hashlib
import math
import re
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path

from absl import app, flags
from sites import Sites, check_privileges
from wire_control import Beside, CoreControl, first_quiet
from wire_cores import StepRates
from wire_measure import Measured, Running
from wire_plans import PLANS
from wire_plot import Point, write_plot
from wire_stream import reached_share
from wire_table import Row, read_csv, say, write_csv

from shardlab.analysis import CollectiveRow, attribute
from shardlab.case_report import report_case
from shardlab.cost.gloo import gloo_collective, header_bytes
from shardlab.errors import Problem, ShardlabError, UserError
from shardlab.hardware.catalog import load_machine
from shardlab.hardware.machine import Machine
from shardlab.lab.cache import Cache, open_cache
from shardlab.program import Program
from shardlab.spec.case import Case, make_case
from shardlab.spec.plan import load_plan

_PLANS = flags.DEFINE_list("plans", list(PLANS), f"Which of {', '.join(PLANS)}.")
_SITES = flags.DEFINE_list("sites", ["2"], "Numbers of sites.")
_DEVICES = flags.DEFINE_list("devices", ["1"], "Devices per site.")
_RATES = flags.DEFINE_list("rates", ["100"], "Mbit/s of each site's link, each way.")
_WARM = flags.DEFINE_integer("warm_steps", 2, "Steps before the first that counts.", lower_bound=1)
_STEPS = flags.DEFINE_integer("count_steps", 10, "Steps that count, at least.", lower_bound=1)
_SECONDS = flags.DEFINE_float("count_seconds", 5, "How long they take, about, at least.", lower_bound=0)
_RUNS = flags.DEFINE_integer("runs", 1, "Of each row; its time is the median of theirs.", lower_bound=1)
_TRIES = flags.DEFINE_integer(
    "tries", 3, "For a run while links or cores beside it are not left alone.", lower_bound=1
)
_CSV = flags.DEFINE_string("csv", None, "Table to write.", allow_override=True)  # validate has one too
_CACHE = flags.DEFINE_string("cache", None, "Folder of compiled programs.", allow_override=True)
_QUICK = flags.DEFINE_bool("quick", False, "Compile without optimisation: where only bytes matter.")
_PLOT = flags.DEFINE_string("plot", None, "SVG file to write: steps over rates, predicted and measured.")
_MEASURED = flags.DEFINE_string(
    "measured", None, "Run nothing: a table of before, whose steps are predicted."
)
LAB = Path(__file__).with_name("lab.toml")


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """Bytes that each site sends to others and within itself, per step, gloo's headers on the former; the
    step's time, the exposed communication in it, and how much gloo's turns may change, None where a part is
    unknown."""

    out_bytes: tuple[Fraction, ...]
    loopback_bytes: tuple[Fraction, ...]
    gloo_bytes: tuple[int, ...]
    step_s: float | None
    communication_s: float | None
    turns_s: float | None


Run = tuple[Measured, Beside | None]  # None where only bytes matter


def machine_file(folder: Path, rate_mbit_per_s: float, cores: StepRates | None = None) -> Path:
    """`lab.toml` with links of this rate, and with these cores."""
    rates = {"uplink_bytes_per_s": rate_mbit_per_s * 125_000}
    if cores is not None:
        rates |= {key: value for key, value in asdict(cores).items() if key != "step_s"}
    text = LAB.read_text()
    for key, value in rates.items():
        text, found = re.subn(rf"(?m)^{key} = \d.*$", f"{key} = {value:.6g}", text)
        assert found == 1
    path = folder / f"lab-{hashlib.sha256(text.encode()).hexdigest()[:8]}.toml"
    path.write_text(text)
    return path


def case_of(mesh: Path, plan: str, on: str) -> Case:
    """One of the lab's plans on a machine."""
    made = PLANS[plan]
    return make_case(load_plan(mesh), made.model, on, made.batch, made.seq)


def predict(case: Case, program: Program, machine: Machine) -> Predicted:
    """What the compiled program will send and take on `machine`, whose hosts are the sites."""
    (part,) = attribute(program, machine=machine)
    per_site = machine.num_devices // machine.hosts
    out, inside = [Fraction(0)] * machine.hosts, [Fraction(0)] * machine.hosts
    headers = [0] * machine.hosts
    rows = zip(part.analysis.collectives, part.members, part.collectives, strict=True)
    for row, joined, collective in rows:
        found = gloo_collective(row.kind, row.payload_bytes, joined.groups, joined.pairs)
        for (source, target), sent in found.sends.items():
            site, other = source // per_site, target // per_site
            (inside if site == other else out)[site] += sent * runs_on(row, source)
        arrays = len(collective.instruction.operands) if row.kind != "all-to-all" else 1
        for (source, target), sent in header_bytes(row.kind, found.sends, row.group_size).items():
            if source // per_site != target // per_site:
                headers[source // per_site] += sent * arrays * runs_on(row, source)
    predicted = report_case(case, program, machine).predicted
    timeline = predicted.timeline if predicted is not None else None
    return Predicted(
        out_bytes=tuple(out),
        loopback_bytes=tuple(inside),
        gloo_bytes=tuple(headers),
        step_s=timeline.step_time_s if timeline is not None else None,
        communication_s=timeline.exposed_communication_s if timeline is not None else None,
        turns_s=predicted.turns_s if predicted is not None else None,
    )


def runs_on(row: CollectiveRow, device: int) -> int:
    """How often a device runs a collective. Raises UserError where that is not known."""
    ranges = [row.executions]
    for runs in row.by_device or ():
        for part in runs.devices.split(","):
            first, _, last = part.partition("-")
            if int(first) <= device <= int(last or first):
                ranges = [runs.executions]
    low, high = ranges[0]
    if low != high:
        raise UserError(Problem(row.name, f"runs {low} to {high} times", "the lab needs exact plans"))
    return low


@dataclass(frozen=True, slots=True, kw_only=True)
class Lab:
    """Where a run keeps its files, and what compiles for its predictions."""

    folder: Path
    cache: Cache

    def case(self, plan: str, sites: int, devices: int, machine: Path) -> tuple[Path, Case]:
        """A plan over so many devices: its mesh file, and the case."""
        mesh = self.folder / f"{plan}{sites * devices}.toml"
        mesh.write_text(PLANS[plan].text(sites * devices, quick=_QUICK.value))
        return mesh, case_of(mesh, plan, f"{machine}:{sites}x{devices}")

    def predict(self, plan: str, sites: int, devices: int, rate: float, cores: StepRates | None) -> Predicted:
        """Compiled once for all rates."""
        _, case = self.case(plan, sites, devices, machine_file(self.folder, rate, cores))
        program = self.cache.compile(self.case(plan, sites, devices, LAB)[1])
        return predict(case, program, load_machine(case.machine))

    def row(self, plan: str, sites: int, devices: int, rate: float, control: CoreControl | None) -> Row:
        """Measure, and predict with the cores that were there."""
        mesh, case = self.case(plan, sites, devices, machine_file(self.folder, rate))
        compiled = Path(_CACHE.value, "sites") if _CACHE.value else None
        with Sites(sites, rate) as network:
            running = Running(network, self.folder, mesh, case, compiled)
            guess_s = running.block(_WARM.value, 1).step_s
            steps = max(_STEPS.value, math.ceil(_SECONDS.value / guess_s))
            blocks = watched(running, steps, network, control, PLANS[plan].alone)
            runs = [first_quiet(blocks, _TRIES.value) for _ in range(_RUNS.value)]
        _, near = middle(runs)
        predicted = self.predict(plan, sites, devices, rate, None if near is None else near.cores)
        return row_of(plan, sites, devices, rate, predicted, runs)

    def again(self, row: Row) -> Row:
        """A row of before with the step that is predicted now."""
        at = (row.plan, row.sites, row.devices_per_site, row.link_mbit_per_s)
        return replace(row, **predicted_columns(self.predict(*at, row.cores)))


def watched(
    running: Running, steps: int, network: Sites, control: CoreControl | None, alone: str
) -> Iterator[Run]:
    """Blocks of steps, and what is beside them; between two of them links and cores, by the step of the plan
    `alone`, are looked at once."""

    def look() -> tuple[float, StepRates] | None:
        return None if control is None else (reached_share(network), control.rates(alone))

    before = look()
    while True:
        measured, after = running.block(_WARM.value, steps), look()
        near = None
        if before is not None and after is not None:
            (share, cores), (share_after, cores_after) = before, after
            share, taken_s = min(share, share_after), measured.step_s
            near = Beside(link_share=share, before=cores, after=cores_after, run_step_s=taken_s)
        yield measured, near
        before = after


def run_lab() -> Iterator[Row]:
    """Every combination of the flags that the plan can be put on; or the rows of --measured."""
    with tempfile.TemporaryDirectory(prefix="shardlab-wire-") as name:
        lab = Lab(folder=Path(name), cache=open_cache(_CACHE.value))
        if _MEASURED.value:
            yield from map(lab.again, read_csv(Path(_MEASURED.value)))
            return
        check_privileges()
        with nullcontext() if _QUICK.value else CoreControl() as control:
            for sites, devices, plan in combinations():
                for rate in map(float, _RATES.value):
                    yield lab.row(plan, sites, devices, rate, control)


def combinations() -> Iterator[tuple[int, int, str]]:
    """Sites, devices per site and plan. Raises UserError for an unknown plan."""
    for plan in _PLANS.value:
        if plan not in PLANS:
            raise UserError(Problem(f"--plans={plan}", "unknown plan", f"known: {', '.join(PLANS)}"))
    for sites in map(int, _SITES.value):
        for devices in map(int, _DEVICES.value):
            for plan in _PLANS.value:
                yield sites, devices, plan


def rounded(time_s: float | None) -> float | None:
    """As the table has it."""
    return None if time_s is None else round(time_s, 4)


def predicted_columns(predicted: Predicted) -> dict[str, float | None]:
    """The columns of the table that hang on links and cores."""
    return {
        "predicted_step_s": rounded(predicted.step_s),
        "predicted_communication_s": rounded(predicted.communication_s),
        "predicted_turns_s": rounded(predicted.turns_s),
    }


def middle(runs: Sequence[Run]) -> Run:
    """The run in the middle by its time."""
    return sorted(runs, key=lambda run: run[0].step_s)[len(runs) // 2]


def row_of(
    plan: str, sites: int, devices: int, rate: float, predicted: Predicted, runs: Sequence[Run]
) -> Row:
    """Prediction and measurement as a row of the table: of the runs the one in the middle, for whose cores
    the prediction is, and the worst of their bytes."""
    measured, chosen = middle(runs)
    errors = [
        abs(found / float(said + headers) - 1)
        for run, _ in runs
        for said, headers, found in zip(predicted.out_bytes, predicted.gloo_bytes, run.out_bytes, strict=True)
        if said
    ]
    most = max(range(sites), key=lambda site: predicted.out_bytes[site])
    near = [one for _, one in runs if one is not None]
    cores = asdict(chosen.cores) if chosen is not None else {}
    return Row(
        plan=plan,
        sites=sites,
        devices_per_site=devices,
        link_mbit_per_s=rate,
        predicted_wire_bytes=round(predicted.out_bytes[most]),
        measured_wire_bytes=round(measured.out_bytes[most]),
        measured_step_s=round(measured.step_s, 4),
        gloo_header_bytes=predicted.gloo_bytes[most],
        site_error=round(max(errors, default=0.0), 4),
        predicted_loopback_bytes=round(predicted.loopback_bytes[most]),
        measured_loopback_bytes=round(measured.loopback_bytes[most]),
        frame_bytes=round(measured.frame_bytes[most]),
        startup_bytes=measured.startup_bytes,
        idle_bytes_per_s=round(measured.idle_bytes_per_s),
        measured_cpu_s=round(measured.cpu_s, 4),
        least_step_s=round(min(run.step_s for run, _ in runs), 4),
        most_step_s=round(max(run.step_s for run, _ in runs), 4),
        link_share=min((round(one.link_share, 3) for one in near), default=None),
        cores_change=max((round(one.cores_change, 3) for one in near), default=None),
        **{f"cores_{name}": float(f"{value:.4g}") for name, value in cores.items()},
        **predicted_columns(predicted),
    )


def main(argv: Sequence[str]) -> None:
    """Run the table."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    rows = []
    try:
        for row in run_lab():
            say(row)
            rows.append(row)
            if _CSV.value:
                write_csv(Path(_CSV.value), rows)
        if _PLOT.value:
            write_plot(Path(_PLOT.value), [point_of(row) for row in rows])
    except ShardlabError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)


def point_of(row: Row) -> Point:
    """What the plot shows of a row."""
    where = f"{row.sites} x {row.devices_per_site}"
    return Point(row.plan, where, row.link_mbit_per_s, row.predicted_step_s, row.measured_step_s)


if __name__ == "__main__":
    app.run(main)
