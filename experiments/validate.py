"""Published runs, predicted from compiled programs, and how far off the predictions are.

python experiments/validate.py --cache=DIR --max_compiles=5    # what is compiled so far, and 5 programs more
python experiments/validate.py --cache=DIR --sources=korthikanti --csv=ROWS.csv   # and ROWS-memory, -energy

Sources and licences: `experiments/validation/data/README.md`. Nothing here is fitted to these rows.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from absl import app, flags
from validation.efficiency import (
    TAKEN_FROM,
    at_efficiency,
    efficiency_of,
    fitted_launch_s,
    fitted_on,
    taken_from,
)
from validation.gpu_rows import attached_gpu, figure_1_rows, korthikanti, torchtitan, vtrain_single_node
from validation.outcome import (
    Outcome,
    energy_outcomes,
    figure_1_compiled,
    figure_1_outcomes,
    memory_outcome,
    step_outcome,
)
from validation.programs import Programs
from validation.row import Row
from validation.sites import implied_rate_lines
from validation.substitution import with_counts
from validation.tables import COLUMNS, csv_line, group_lines, outcome_lines, score_lines
from validation.tpu_rows import tpu_recipes

from shardlab.case_report import CaseReport, report_case
from shardlab.errors import ShardlabError
from shardlab.hardware.catalog import load_machine

ATTENTION = flags.DEFINE_enum(
    "megatron_attention", "auto", ["auto", "reference"], "What stands in for Megatron's kernels of 2022."
)
SOURCES: dict[str, Callable[[], Iterator[Row]]] = {
    "korthikanti": lambda: korthikanti(ATTENTION.value),
    "torchtitan": torchtitan,
    "tpu_recipes": tpu_recipes,
    "vtrain_single_node": lambda: vtrain_single_node(ATTENTION.value),
    "attached_gpu": attached_gpu,
}
SOURCE_LIST = flags.DEFINE_list("sources", list(SOURCES), "Which sources, separated by commas.")
CACHE = flags.DEFINE_string("cache", "programs", "Folder of compiled programs; made where it is not there.")
MAX_COMPILES = flags.DEFINE_integer("max_compiles", 0, "How many programs to compile that are not there yet.")
COMPILE_ONLY = flags.DEFINE_string("compile_only", "", "Compile only rows whose name this pattern finds.")
ANY_SOURCES = flags.DEFINE_bool(
    "any_sources",
    False,
    "Also take programs that other versions of shardlab or of a compiler made; it says so.",
)
CALIBRATE = flags.DEFINE_bool("calibrate", False, "One efficiency per chip, taken from one row each.")
CSV = flags.DEFINE_string("csv", None, "Write every row here; memory and energy beside it.")
EVERY_ROW = flags.DEFINE_bool("every_row", False, "Print a line for every row, not only for those predicted.")


def reported(row: Row, programs: Programs, efficiency: float = 1.0) -> CaseReport | str:
    """The report of the row's case, or why there is none. efficiency: of the chip's peak."""
    assert row.case is not None
    program = programs.find(row.case, compiling=re.search(COMPILE_ONLY.value, row.row) is not None)
    if program is None:
        return programs.why_not(row.case)
    try:
        if row.counts is not None:
            program = with_counts(program, row.counts)
        machine = at_efficiency(load_machine(row.case.machine), efficiency)
        return report_case(row.case, program, machine, attention_kernel=row.attention_kernel)
    except (ShardlabError, ValueError) as error:
        return f"not analysed: {error}"


def efficiencies(programs: Programs) -> dict[str, float]:
    """Chip -> efficiency, of the chips whose row has a program."""
    found: dict[str, float] = {}
    for chip, (source, begins) in TAKEN_FROM.items():
        (row,) = [row for row in SOURCES[source]() if row.row.startswith(begins)]

        def step_s(efficiency: float, row: Row = row) -> float | None:
            answer = reported(row, programs, efficiency)
            return None if isinstance(answer, str) else answer.step_time_s

        assert row.measured_step_s is not None
        efficiency = efficiency_of(step_s, row.measured_step_s)
        if efficiency is not None:
            found[chip] = efficiency
            print(
                f"calibration: {chip} computes at {efficiency:.3f} of its tables (from {source}, {row.row})"
            )
    return found


def outcomes(
    rows: Iterable[Row], programs: Programs, known: Mapping[str, float]
) -> Iterator[tuple[Outcome, Outcome | None]]:
    """The step and, where memory was measured, the memory of every row. known: efficiencies by chip."""
    for row in rows:
        answer = (
            row.excluded_because if row.case is None else reported(row, programs, known.get(row.chip, 1.0))
        )
        step: CaseReport | str = answer
        if row.chip in known and taken_from(row):
            step = "calibration: the chip's efficiency is taken from it"
        yield (
            step_outcome(row, step),
            memory_outcome(row, answer) if row.measured_bytes is not None else None,
        )


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


def tables(programs: Programs) -> dict[str, list[Outcome]]:
    """The rows of each kind of table."""
    known = efficiencies(programs) if CALIBRATE.value else {}
    steps: list[Outcome] = []
    memory: list[Outcome] = []
    for name in SOURCE_LIST.value:
        for step, held in outcomes(SOURCES[name](), programs, known):
            steps.append(step)
            memory += [held] if held is not None else []
    memory += figure_1_outcomes()
    for row in figure_1_rows(ATTENTION.value):
        answer = row.excluded_because if row.case is None else reported(row, programs)
        memory += figure_1_compiled(row, answer)
    steps = with_launches(steps) if CALIBRATE.value else steps
    return {"step": steps, "memory": memory, "energy": list(energy_outcomes())}


def main(argv: Sequence[str]) -> None:
    """Print the tables as Markdown."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    unknown = [name for name in SOURCE_LIST.value if name not in SOURCES]
    if unknown:
        raise app.UsageError(f"unknown sources {unknown}; known: {', '.join(SOURCES)}")
    programs = Programs(Path(CACHE.value), MAX_COMPILES.value, any_sources=ANY_SOURCES.value)
    found = tables(programs)
    for kind, rows in found.items():
        lines = outcome_lines(rows, every=EVERY_ROW.value)
        print("\n".join([f"\n## {kind}\n", *score_lines(rows), "", *lines]))
    print("\n".join([*group_lines(found["step"]), "", *implied_rate_lines()]))
    if programs.stale:
        print(f"\n{len(programs.stale)} programs are of other versions of the sources (--any_sources)")
    if CSV.value is not None:
        path = Path(CSV.value)
        for kind, rows in found.items():
            suffix = "" if kind == "step" else f"-{kind}"
            write_csv(path.with_name(path.stem + suffix + path.suffix), kind, rows)
    sys.stdout.flush()


if __name__ == "__main__":
    app.run(main)
