"""Outcomes as CSV and Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from validation.outcome import Outcome
from validation.scores import Score, score, spearman, top1_regret

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


def score_lines(raw: Sequence[Outcome], calibrated: Sequence[Outcome]) -> Iterator[str]:
    """A table of one line per source and, where it has several, per chip. calibrated: the same rows."""
    yield (
        "| | rows | scored | excluded | not compiled | raw: mean | bias | worst | Spearman "
        "| calibrated: scored | mean | worst | Spearman |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|---|"
    for source in dict.fromkeys(row.source for row in raw):
        of = [pair for pair in zip(raw, calibrated, strict=True) if pair[0].source == source]
        yield _score_line(source, of)
        chips = tuple(dict.fromkeys(one.chip for one, _ in of))
        for chip in chips if len(chips) > 1 else ():
            yield _score_line(f"{source}, {chip}", [pair for pair in of if pair[0].chip == chip])


def _score_line(name: str, rows: Sequence[tuple[Outcome, Outcome]]) -> str:
    raw, calibrated = (list(side) for side in zip(*rows, strict=True))
    scored = sum(row.error is not None for row in raw)
    waiting = sum(row.waiting for row in raw)
    counts = f"| {name} | {len(raw)} | {scored} | {len(raw) - scored - waiting} | {waiting} |"
    found, after = _score(raw), _score(calibrated)
    before = "– | – | – | – |"
    if found is not None:
        before = f"{_percent(found.mean)} | {_signed(found.bias)} | {_signed(found.worst)} | {_rank(found)} |"
    if after is None or calibrated == raw:
        return f"{counts} {before} | | | |"
    then = f"{after.pairs} | {_percent(after.mean)} | {_signed(after.worst)} | {_rank(after)} |"
    return f"{counts} {before} {then}"


def _score(rows: Sequence[Outcome]) -> Score | None:
    return score([(row.measured or 0.0, row.predicted or 0.0) for row in rows if row.error is not None])


def _rank(found: Score) -> str:
    return "–" if found.spearman is None else f"{found.spearman:.2f}"


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


def group_lines(raw: Sequence[Outcome], calibrated: Sequence[Outcome]) -> Iterator[str]:
    """Order within the groups that a user would choose among, of three rows that are scored and more."""
    if not any(_groups(raw)):
        return
    yield "\n## order within groups of three rows and more\n"
    yield "| | groups | mean Spearman | worst | mean top-1 regret | worst |"
    yield "|---|---|---|---|---|---|"
    for name, rows in (("raw", raw), ("calibrated", calibrated)):
        groups = _groups(rows)
        ranked = {group: spearman(pairs) for group, pairs in groups.items()}
        regret = {group: top1_regret(pairs) for group, pairs in groups.items()}
        if not groups:
            continue
        worst, most = min(ranked, key=lambda one: ranked[one]), max(regret, key=lambda one: regret[one])
        yield (
            f"| {name} | {len(groups)} | {statistics.fmean(ranked.values()):.2f} "
            f"| {ranked[worst]:.2f} ({_group_name(worst)}) | {_percent(statistics.fmean(regret.values()))} "
            f"| {_percent(regret[most])} ({_group_name(most)}) |"
        )


def _groups(rows: Sequence[Outcome]) -> dict[tuple[str, ...], list[tuple[float, float]]]:
    groups: dict[tuple[str, ...], list[tuple[float, float]]] = {}
    for row in rows:
        if row.group and row.measured is not None and row.predicted is not None:
            groups.setdefault(row.group, []).append((row.measured, row.predicted))
    return {group: pairs for group, pairs in groups.items() if len(pairs) > 2}


def _group_name(group: tuple[str, ...]) -> str:
    return ", ".join(group)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _signed(share: float) -> str:
    return f"{100 * share:+.1f} %"


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
