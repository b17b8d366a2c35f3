"""The Chrome trace of a timeline: loadable, in order, nothing on top of another, loops within a bound."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from case_reports import report
from hypothesis import given, settings
from hypothesis import strategies as st
from timelines import block, gather, kernel, line, loop

from shardlab.cli import main
from shardlab.lab import study
from shardlab.prediction import Prediction
from shardlab.report.trace import LOOPS, chrome_trace

BODY = block(3.0, gather(0.0, 2.0), kernel(0.0, 3.0))
STEP = block(14.0, gather(0.0, 13.0), kernel(0.0, 1.0), loop(1.0, BODY, 4), kernel(13.0, 1.0))


def checked(trace: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The complete events, after the rules that hold for every trace."""
    assert json.loads(json.dumps(trace)) == trace
    events = trace["traceEvents"]
    threads = {event["tid"] for event in events if event["name"] == "thread_name"}
    complete = [event for event in events if event["ph"] == "X"]
    assert {event["ph"] for event in events} <= {"X", "M"}
    assert [event["ts"] for event in complete] == sorted(event["ts"] for event in complete)
    ends: dict[int, float] = {}
    for event in complete:
        assert event["tid"] in threads and event["pid"] == 0 and event["dur"] >= 0
        assert event["ts"] >= ends.get(event["tid"], 0.0) - 1e-3
        ends[event["tid"]] = event["ts"] + event["dur"]
    return complete


def threads_of(trace: Mapping[str, Any]) -> dict[int, str]:
    return {e["tid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"}


def test_a_loop_is_expanded_and_axes_and_layers_are_named() -> None:
    trace = chrome_trace(line(STEP), "plan on h100:1x8")
    complete = checked(trace)
    assert trace["traceEvents"][0]["args"] == {"name": "plan on h100:1x8"}  # type: ignore[index]
    names = threads_of(trace)
    on = [(names[e["tid"]], e["ts"] / 1e6, e["dur"] / 1e6) for e in complete]
    # The gather from outside is under way while the loop has its own: these go on a second lane.
    assert [one for one in on if one[0] == "collectives"] == [("collectives", 0, 13)]
    assert [one[1:] for one in on if one[0] == "collectives (2)"] == [(1, 2), (4, 2), (7, 2), (10, 2)]
    assert [one[1:] for one in on if one[0] == "compute"] == [
        (0, 1),
        (1, 3),
        (4, 3),
        (7, 3),
        (10, 3),
        (13, 1),
    ]
    assert [one[1:] for one in on if one[0] == LOOPS] == [(1, 12)]
    one = next(event for event in complete if event["cat"] == "communication")
    assert one["name"] == "all-gather over fsdp+tensor layers/mlp"
    assert one["args"] == {
        "instruction": "all-gather.1",
        "kind": "all-gather",
        "layer": "layers/mlp",
        "axes": "fsdp+tensor",
    }


def test_what_does_not_fit_is_one_event() -> None:
    """Room for eight: gather, kernel, loop, and two iterations of two; the others are folded."""
    complete = checked(chrome_trace(line(STEP), "x", max_events=8))
    folded = next(event for event in complete if event["name"] == "while.1 × 2")
    assert (folded["ts"] / 1e6, folded["dur"] / 1e6, folded["args"]["iterations"]) == (7, 6, 2)
    assert len(complete) == 9


def test_the_bound_holds_for_nested_loops() -> None:
    deep = block(3.0, kernel(0.0, 3.0))
    for _ in range(4):
        deep = block(deep.duration_s * 100, loop(0.0, deep, 100))
    assert len(checked(chrome_trace(line(deep), "x", max_events=1000))) < 1100


@given(st.lists(st.tuples(st.floats(0, 9), st.floats(1e-9, 4), st.sampled_from("ab")), max_size=20))
@settings(max_examples=60, deadline=None)
def test_nothing_lies_on_top_of_another(found: list[tuple[float, float, str]]) -> None:
    events = [gather(start_s, duration_s, stream) for start_s, duration_s, stream in found]
    trace = chrome_trace(line(block(13.0, *events)), "x")
    assert len(checked(trace)) == len(found)


def test_explain_writes_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    made = report(predicted=Prediction(timeline=line(STEP), basis=()))
    monkeypatch.setattr(study, "explain_plan", lambda *_, **__: made)
    file = tmp_path / "step.json"
    assert main(["explain", "plan.toml", "--json", "--trace", str(file)]) == 0
    assert checked(json.loads(file.read_text())) and json.loads(capsys.readouterr().out)
    monkeypatch.setattr(study, "explain_plan", lambda *_, **__: report())
    assert main(["explain", "plan.toml", "--json", "--trace", str(tmp_path / "none.json")]) == 0
    assert "no step time" in capsys.readouterr().err
    assert not (tmp_path / "none.json").exists()
