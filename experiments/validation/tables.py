"""Outcomes as CSV and Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from validation.outcome import Outcome
from validation.scores import score, spearman, top1_regret

UNITS = {"step": "step_s", "memory": "bytes", "energy": "energy_j"}
COLUMNS = {
    kind: (
        "source",
        "row",
        "chip",
        f"measured_{unit}",
        f"predicted_{unit}",
        "error_pct",
        "excluded_because",
    )
    for kind, unit in UNITS.items()
}


def csv_line(row: Outcome) -> tuple[str, ...]:
    """The fields of `COLUMNS`; unknown is empty."""
    error = "" if row.error is None else f"{100 * row.error:.2f}"
    figures = ("" if value is None else f"{value:.6g}" for value in (row.measured, row.predicted))
    return (row.source, row.row, row.chip, *figures, error, row.excluded_because)


def score_lines(rows: Sequence[Outcome]) -> Iterator[str]:
    """A table of one line per source and, where it has several, per chip."""
    yield "| source | rows | scored | excluded | not compiled | mean error | bias | worst | Spearman |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for source in dict.fromkeys(row.source for row in rows):
        of = [row for row in rows if row.source == source]
        yield _score_line(source, of)
        chips = tuple(dict.fromkeys(row.chip for row in of))
        for chip in chips if len(chips) > 1 else ():
            yield _score_line(f"{source}, {chip}", [row for row in of if row.chip == chip])


def _score_line(name: str, rows: Sequence[Outcome]) -> str:
    scored = [row for row in rows if row.error is not None]
    waiting = sum(row.waiting for row in rows)
    found = score([(row.measured or 0.0, row.predicted or 0.0) for row in scored])
    counts = f"| {name} | {len(rows)} | {len(scored)} | {len(rows) - len(scored) - waiting} | {waiting} |"
    if found is None:
        return f"{counts} – | – | – | – |"
    rank = "–" if found.spearman is None else f"{found.spearman:.2f}"
    return f"{counts} {_percent(found.mean)} | {_signed(found.bias)} | {_signed(found.worst)} | {rank} |"


def outcome_lines(rows: Sequence[Outcome], *, every: bool) -> Iterator[str]:
    """A line per row; without `every` only rows that are scored."""
    yield "| row | chip | measured | predicted | error | why not, or what differs |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        if row.error is None and not every:
            continue
        measured, predicted = (_figure(value) for value in (row.measured, row.predicted))
        error = "–" if row.error is None else _signed(row.error)
        why = row.excluded_because or "; ".join(row.notes)
        yield f"| {row.source} {row.row} | {row.chip} | {measured} | {predicted} | {error} | {why} |"


def group_lines(rows: Sequence[Outcome]) -> Iterator[str]:
    """Order within the groups that a user would choose among, of three rows that are scored and more."""
    groups: dict[tuple[str, ...], list[tuple[float, float]]] = {}
    for row in rows:
        if row.group and row.measured is not None and row.predicted is not None:
            groups.setdefault(row.group, []).append((row.measured, row.predicted))
    full = {group: pairs for group, pairs in groups.items() if len(pairs) > 2}
    if not full:
        return
    ranked = {group: spearman(pairs) for group, pairs in full.items()}
    regret = {group: top1_regret(pairs) for group, pairs in full.items()}
    worst = min(ranked, key=lambda group: ranked[group])
    yield f"\n## order within {len(full)} groups of three rows and more\n"
    means = statistics.fmean(ranked.values()), statistics.fmean(regret.values())
    yield f"mean Spearman {means[0]:.2f}, worst {ranked[worst]:.2f} ({', '.join(worst)});"
    yield f"mean top-1 regret {_percent(means[1])}, worst {_percent(max(regret.values()))}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _signed(share: float) -> str:
    return f"{100 * share:+.1f} %"


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
