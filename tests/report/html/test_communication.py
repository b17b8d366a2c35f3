"""Tables of what is sent: cells add up to the program's totals, and what is not shown is counted."""

from __future__ import annotations

import re
from fractions import Fraction

from case_reports import GB, analysis, collective
from saved_plans import llama_70b

from shardlab.report.html import communication
from shardlab.report.html.busiest import busiest
from shardlab.report.html.communication import collectives_listing, heat_map, link_table, sent
from shardlab.units import format_bytes


def test_sums_by_key_are_those_of_the_analysis() -> None:
    """The totals were added up along the call graph, these row by row."""
    found = llama_70b().analysis
    assert found is not None
    rows = busiest(found).rows
    by_axes = sent(rows, lambda row: "+".join(row.axes or ()))
    assert by_axes == {key: entry["wire_bytes"] for key, entry in found.totals.by_axes.items()}
    by_phase = sent(rows, lambda row: row.phase)
    assert by_phase == {key: entry["wire_bytes"] for key, entry in found.totals.by_phase.items()}


def test_cells_of_the_heat_map_are_sums_of_executions_times_bytes() -> None:
    """7 GB twice forward in gate; 7 GB thrice backward in gate over tensor; 1 GB in no layer."""
    made = analysis(
        collective("a"),
        collective("b", phase="backward", axes=("tensor",), executions=(3, 3)),
        collective("c", layer="", executions=(1, 1), wire_bytes=Fraction(GB)),
    )
    (heat,) = heat_map(busiest(made))
    assert heat.groups == (("all", ("sum",)), ("tensor", ("backward",)), ("fsdp", ("forward",)))
    cells = {
        label: [None if one is None else (one.text, one.share) for one in row] for label, row in heat.rows
    }
    assert cells == {
        "layers/mlp/gate": [("35 GB", 0.0), ("21 GB", 1.0), ("14 GB", 14 / 21)],
        "(no layer)": [("1 GB", 0.0), None, ("1 GB", 1 / 21)],
    }


def test_many_layers_end_in_one_row_for_the_rest() -> None:
    rows = [collective(f"c{n}", layer=f"layers/{n}", wire_bytes=Fraction(GB * (n + 1))) for n in range(30)]
    (heat,) = heat_map(busiest(analysis(*rows)))
    assert len(heat.rows) == communication.LAYERS + 1
    label, (total, *_) = heat.rows[-1]
    rest = 30 - communication.LAYERS
    assert label == f"{rest} smaller layers"
    assert total is not None
    assert total.text == format_bytes(2 * GB * sum(range(1, rest + 1)))


def test_the_hottest_link_comes_first_with_its_share_of_the_step() -> None:
    """0.02 s twice over fsdp is 40 ms of 0.4 s; 0.05 s thrice over tensor 150 ms. 0.02 s is not exact."""
    made = analysis(
        collective("a"), collective("b", axes=("tensor",), executions=(3, 3), tier_s={"nvlink": 0.05})
    )
    (table,) = link_table(busiest(made), 0.4)
    shown = [[value[0].text for value in row] for row in table.rows]
    assert shown == [
        ["nvlink", "tensor", "21 GB", "150 ms", "38 %"],
        ["nvlink", "fsdp", "14 GB", "40.0 ms", "10 %"],
    ]


def test_a_listing_has_every_collective_or_counts_the_rest(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(communication, "ITEMS", 2)
    rows = [collective(f"c{n}", wire_bytes=Fraction(GB * (n + 1)), executions=(1, 1)) for n in range(4)]
    (listing,) = collectives_listing(analysis(*rows))
    assert [item.order[0] for item in listing.items] == [4 * GB, 3 * GB]
    assert re.match(r"2 smaller ones not shown, 3 GB together", listing.caption)
