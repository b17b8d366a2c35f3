"""Where devices run collectives a different number of times, the report shows the one that sends most."""

from __future__ import annotations

from fractions import Fraction

from case_reports import GB, analysis, collective

from shardlab.analysis.records import DeviceRuns
from shardlab.report.html.busiest import BRANCHES, busiest


def runs(*parts: tuple[int, str]) -> tuple[DeviceRuns, ...]:
    return tuple(DeviceRuns(executions=(count, count), devices=devices) for count, devices in parts)


def test_the_busiest_device_may_be_the_first_of_no_part() -> None:
    """7 GB each: device 3 runs the one 5 times and the other 4 times, 63 GB; no other device as many."""
    one = collective("a", executions=(0, 5), by_device=runs((0, "0-1,4-7"), (5, "2-3")))
    other = collective("b", executions=(1, 4), by_device=runs((1, "0-2"), (4, "3-7")))
    found = busiest(analysis(one, other))
    assert [row.executions for row in found.rows] == [(5, 5), (4, 4)]
    assert "device 3," in found.note


def test_rows_that_all_devices_run_keep_their_executions() -> None:
    found = busiest(
        analysis(collective("a", executions=(0, 2), by_device=runs((2, "0-3"), (0, "4-7"))), collective("b"))
    )
    assert [row.executions for row in found.rows] == [(2, 2), (2, 2)]


def test_equal_devices_have_nothing_to_say() -> None:
    plain = analysis(collective())
    assert busiest(plain).note == ""
    assert busiest(plain).rows == plain.collectives


def test_branches_that_do_not_sum_to_the_total_are_said() -> None:
    """Two branches of 7 GB of which one runs: the total is 7 GB, the rows are 14."""
    made = analysis(collective("a", executions=(0, 1)), collective("b", executions=(0, 1)))
    assert made.totals.wire_bytes[1] == 0  # the helper takes the lower end
    assert busiest(made).note == BRANCHES
    assert sum(
        row.executions[1] * row.wire_bytes for row in busiest(made).rows if row.executions[1]
    ) == Fraction(14 * GB)
