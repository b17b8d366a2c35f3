"""`--order` on the command line and in reports: the table, the document, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from case_reports import case, report
from order_programs import program

from shardlab.cli import main
from shardlab.hardware.catalog import load_machine
from shardlab.lab.study import orders_of
from shardlab.order import orders
from shardlab.program import Program, save
from shardlab.report.order import orders_table, with_orders
from shardlab.report.page import Page

MESH = {"data": 2, "tensor": 4}
# 6,144 K over tensor and 64 K over data, see order/test_search.py.
K = 1 << 14
TEXT = program(MESH, (["tensor"], 4096 * K), (["data"], 64 * K))
ACROSS = (0, 2, 4, 6, 1, 3, 5, 7)
MACHINE = "h100:2x4"


@pytest.fixture
def hlo(tmp_path: Path) -> str:
    path = tmp_path / "m.txt"
    path.write_text(TEXT)
    return str(path)


def compiled(**changes: object) -> Program:
    made = Program(
        name="m", backend="gpu", hlo_text=TEXT, num_devices=8, mesh=MESH, device_ids=tuple(range(8))
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def test_analyze_adds_the_orders_and_changes_nothing_else(
    hlo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("analyze", hlo, "--axes", "data=2,tensor=4", "--on", MACHINE, "--json")
    assert main(asked) == 0
    plain = json.loads(capsys.readouterr().out)
    assert main((*asked, "--order")) == 0
    document = json.loads(capsys.readouterr().out)
    found = document.pop("orders")
    assert document == plain
    assert [(one["own"], one["traffic"]["infiniband"]) for one in found["results"]] == [
        (True, [64 * K, 64 * K]), (False, [2048 * K, 2048 * K]),
    ]  # fmt: skip


def test_the_table_says_what_is_better_and_how_to_get_it(
    hlo: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # no cell wraps
    ids = ",".join(map(str, ACROSS))
    asked = ("analyze", hlo, "--axes", "data=2,tensor=4", "--on", MACHINE, "--device-ids", ids, "--order")
    assert main(asked) == 0
    out = capsys.readouterr().out
    table = out[out.index("Device orders") : out.index("By kind")]
    assert table.index("row-major") < table.index("as compiled: nested tensor > data")
    assert 'order = "row-major" in the mesh file' in " ".join(table.split())
    assert "3 orders tried; ranked by communication time" in table
    assert "infiniband 1.05 MB" in table  # 2^20


def test_markdown_has_the_table_too(hlo: str, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("analyze", hlo, "--axes", "data=2,tensor=4", "--on", MACHINE, "--order", "--markdown")
    assert main(asked) == 0
    assert "how to get it" in capsys.readouterr().out


def test_a_saved_program_brings_mesh_and_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "step.program"
    save(compiled(device_ids=ACROSS), path)
    assert main(("analyze", str(path), "--on", MACHINE, "--order", "--json")) == 0
    results = json.loads(capsys.readouterr().out)["orders"]["results"]
    assert [(one["name"], one["own"]) for one in results] == [
        ("row-major", False), ("as compiled: nested tensor > data", True),
    ]  # fmt: skip
    assert results[1]["device_ids"] == list(ACROSS)


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (("--axes", "data=2,tensor=4"), "--order: needs a machine; give --on MACHINE"),
        (("--on", MACHINE), "--order: the mesh is not known; give --axes"),
    ],
    ids=["no-machine", "no-axes"],
)
def test_what_is_missing_is_one_line(
    flags: tuple[str, ...], wanted: str, hlo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(("analyze", hlo, "--order", *flags)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(wanted)
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("notes", "name"),
    [((), "make_mesh: row-major"), (("make_mesh refuses 2x4 here, …",), "as compiled: row-major")],
    ids=["make-mesh", "refused"],
)
def test_a_case_calls_its_order_what_the_plan_calls_it(notes: tuple[str, ...], name: str) -> None:
    made = report(case=case(machine=MACHINE), program=compiled(notes=notes))
    found = orders_of(made)
    assert found is not None
    assert found.own.name == name


def test_a_case_without_an_answer_has_no_orders() -> None:
    assert orders_of(report(program=None)) is None
    assert orders_of(report(program=compiled(), analysis=None)) is None


def test_a_page_without_orders_is_left_alone() -> None:
    page = Page(title="t")
    assert with_orders(page, None) is page


def test_a_search_that_was_cut_short_says_so() -> None:
    found = orders(TEXT, load_machine(MACHINE), MESH)
    assert "there are more" not in orders_table(found).caption
    assert "3 orders tried, there are more" in orders_table(replace(found, complete=False)).caption
    assert "bytes on the outermost link" in orders_table(replace(found, by="bytes")).caption
