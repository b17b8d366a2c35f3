"""Published runs, predicted from compiled programs, and how far off the predictions are.

python experiments/validate.py --cache=DIR --max_compiles=5    # what is compiled so far, and 5 programs more
python experiments/validate.py --cache=DIR --sources=korthikanti --csv=ROWS.csv   # and ROWS-memory, -energy
python experiments/validate.py --cache=DIR --error_classes     # write what predictions say of their errors

Sources and licences: `experiments/validation/data/README.md`. Raw predictions fit nothing to these rows;
calibrated ones take the constants that they print from rows that are not scored.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from absl import app, flags
from validation.analysed import Analysed, analysed
from validation.efficiency import (
    efficiency_of,
    fitted_launch_s,
    fitted_on,
    taken_from,
)
from validation.error_classes import write_error_classes
from validation.gpu_rows import (
    attached_gpu,
    figure_1_baselines,
    figure_1_rows,
    korthikanti,
    torchtitan,
    vtrain_single_node,
)
from validation.outcome import (
    Outcome,
    energy_outcomes,
    figure_1_compiled,
    figure_1_outcomes,
    memory_outcome,
    step_outcome,
    verdict_line,
)
from validation.programs import Programs
from validation.row import Row
from validation.sites import implied_rate_lines
from validation.tables import COLUMNS, csv_line, group_lines, outcome_lines, score_lines
from validation.tpu_rows import tpu_recipes

from shardlab.case_report import CaseReport, report_case
from shardlab.hardware.catalog import load_machine
from shardlab.program import Program

SOURCES: dict[str, Callable[[], Iterator[Row]]] = {
    "korthikanti": korthikanti,
    "torchtitan": torchtitan,
    "tpu_recipes": tpu_recipes,
    "vtrain_single_node": vtrain_single_node,
    "attached_gpu": attached_gpu,
}
SOURCE_LIST = flags.DEFINE_list("sources", list(SOURCES), "Which sources, separated by commas.")
CACHE = flags.DEFINE_string("cache", "programs", "Store of compiled programs; made where it is not there.")
MAX_COMPILES = flags.DEFINE_integer("max_compiles", 0, "How many programs to compile that are not there yet.")
COMPILE_ONLY = flags.DEFINE_string("compile_only", "", "Compile only rows whose name this pattern finds.")
CSV = flags.DEFINE_string("csv", None, "Write every row here, calibrated; memory and energy beside it.")
EVERY_ROW = flags.DEFINE_bool("every_row", False, "Print a line for every row, not only for those predicted.")
ERROR_CLASSES = flags.DEFINE_bool("error_classes", False, "Write the raw errors by chip into the package.")


def program_of(row: Row, programs: Programs) -> Program | str:
    """The program of a row, or why there is none."""
    if row.case is None:
        return row.excluded_because
    found = programs.find(row.case, compiling=re.search(COMPILE_ONLY.value, row.row) is not None)
    return programs.why_not(row.case) if found is None else found


def efficiencies(rows: Mapping[str, Analysed]) -> dict[str, float]:
    """Chip -> efficiency, of the chips whose row is analysed. rows: by the chip whose efficiency they say."""
    found: dict[str, float] = {}
    for chip, one in rows.items():

        def step_s(efficiency: float, one: Analysed = one) -> float | None:
            line = one.timeline(efficiency)
            return None if isinstance(line, str) else line.step_time_s

        assert one.row.measured_step_s is not None
        efficiency = efficiency_of(step_s, one.row.measured_step_s)
        if efficiency is not None:
            found[chip] = efficiency
            source, row = one.row.source, one.row.row
            print(f"calibration: {chip} computes at {efficiency:.3f} of its tables (from {source}, {row})")
    return found


def calibrating(programs: Programs, sources: Sequence[str]) -> dict[str, Analysed]:
    """The rows that efficiencies are taken from, by chip; those that have a program."""
    found = {}
    for row in (row for source in sources for row in SOURCES[source]() if taken_from(row)):
        program = program_of(row, programs)
        one = program if isinstance(program, str) else analysed(row, program)
        if isinstance(one, Analysed):
            found[row.chip] = one
    return found


def steps_of(row: Row, program: Program | str, known: Mapping[str, float]) -> tuple[Outcome, Outcome]:
    """The step, raw and calibrated. known: efficiencies by chip."""
    one = program if isinstance(program, str) else analysed(row, program)
    if isinstance(one, str):
        return step_outcome(row, one), step_outcome(row, one)
    raw = step_outcome(row, one.timeline())
    if row.chip not in known:
        return raw, raw
    if taken_from(row):
        return raw, step_outcome(row, "calibration: the chip's efficiency is taken from it")
    return raw, step_outcome(row, one.timeline(known[row.chip]))


def with_launches(steps: Sequence[Outcome]) -> list[Outcome]:
    """Eager rows with the time that launching takes, which some of them say; those are not scored."""
    eager = [row for row in steps if row.eager is not None]
    used = {(row.source, row.row) for row in fitted_on(eager)}
    if not used:
        return list(steps)
    each_s = fitted_launch_s(
        [(row.measured or 0.0, row.eager) for row in eager if row.eager and (row.source, row.row) in used]
    )
    print(f"calibration: {each_s * 1e3:.2f} ms to launch one run of a layer, from {len(used)} rows")
    why = "calibration: the time to launch a layer is taken from it"
    return [
        replace(row, predicted=None, excluded_because=why)
        if (row.source, row.row) in used
        else replace(row, predicted=row.eager.at(each_s))
        if row.eager is not None
        else row
        for row in steps
    ]


def write_csv(path: Path, kind: str, rows: Iterable[Outcome]) -> None:
    """One line per row, scored or not."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS[kind])
        writer.writerows(csv_line(row) for row in rows)


def read_together(row: Row) -> str:
    """Rows whose programs have one text are of one name."""
    if row.case is None or row.counts is None:
        return ""
    case, counts = row.case, row.counts
    return f"{case.model.name} {case.batch} {case.plan.axes} {counts.layers} {counts.microbatches}"


def tables(programs: Programs) -> dict[str, tuple[list[Outcome], list[Outcome]]]:
    """The rows of each kind of table, raw and calibrated."""
    sources = SOURCE_LIST.value
    known = efficiencies(calibrating(programs, sources))
    rows = [row for name in sources for row in SOURCES[name]()]
    steps: dict[int, tuple[Outcome, Outcome]] = {}
    held: dict[int, Outcome] = {}
    for done, at in enumerate(sorted(range(len(rows)), key=lambda at: (read_together(rows[at]), at)), 1):
        program = program_of(rows[at], programs)
        steps[at] = steps_of(rows[at], program, known)
        if rows[at].measured_bytes is not None:
            held[at] = memory_outcome(rows[at], program)
        if done % 100 == 0:
            print(f"{done} of {len(rows)} rows", file=sys.stderr, flush=True)
    raw, calibrated = ([steps[at][which] for at in range(len(rows))] for which in (0, 1))
    memory = [held[at] for at in sorted(held)]
    memory += figure_1_outcomes()
    for row in figure_1_rows():
        memory += figure_1_compiled(row, _reported(row, program_of(row, programs)))
    energy = list(energy_outcomes())
    return {"step": (raw, with_launches(calibrated)), "memory": (memory, memory), "energy": (energy, energy)}


def _reported(row: Row, program: Program | str) -> CaseReport | str:
    if isinstance(program, str) or row.case is None:
        return str(program)
    return report_case(row.case, program, load_machine(row.case.machine))


def main(argv: Sequence[str]) -> None:
    """Print the tables as Markdown."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    unknown = [name for name in SOURCE_LIST.value if name not in SOURCES]
    if unknown:
        raise app.UsageError(f"unknown sources {unknown}; known: {', '.join(SOURCES)}")
    programs = Programs(Path(CACHE.value), MAX_COMPILES.value)
    found = tables(programs)
    for kind, (raw, calibrated) in found.items():
        lines = outcome_lines(calibrated, every=EVERY_ROW.value)
        print("\n".join([f"\n## {kind}\n", *score_lines(raw, calibrated), "", *lines]))
    print("\nfigure 1 of Korthikanti: its baselines, compiled")
    for row in figure_1_baselines():
        print(f"  {verdict_line(row, program_of(row, programs))}")
    raw, calibrated = found["step"]
    print("\n".join([*group_lines(raw, calibrated), "", *implied_rate_lines()]))
    if ERROR_CLASSES.value:
        write_error_classes(raw)
    if CSV.value is not None:
        path = Path(CSV.value)
        for kind, (_, rows) in found.items():
            suffix = "" if kind == "step" else f"-{kind}"
            write_csv(path.with_name(path.stem + suffix + path.suffix), kind, rows)
    sys.stdout.flush()


if __name__ == "__main__":
    app.run(main)
