"""The Analysis end to end: sources, the JSON contract, totals, ledger, and what it imports."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

import shardlab
from shardlab.analysis import Analysis, analysis_from_json, analyze, merge
from shardlab.errors import ParseError, UserError
from shardlab.hardware.catalog import load_machine
from shardlab.hlo.reader import parse
from shardlab.program import Flags, Program, save

GOLDEN = Path(__file__).parent / "golden" / "hlo"
AXES = {"data": 2, "model": 4}
UNEVEN = (GOLDEN / "c20_uneven_groups.hlo").read_text()
CONDITIONAL = (GOLDEN / "d17_conditional.hlo").read_text()
UNKNOWN = (GOLDEN / "d13_dynamic_trip.hlo").read_text()
PLAIN = (GOLDEN / "c07_v3_mesh.hlo").read_text()
NAMED = PLAIN.replace(
    "to_apply=%add",
    'to_apply=%add, metadata={op_name="jit(step)/transpose(jvp(layers))/mlp/down/dot_general"'
    ' source_file="/home/me/transformer.py" source_line=112}',
)
PROGRAM = Program(
    name="fsdp",
    backend="cpu",
    hlo_text=PLAIN,
    num_devices=8,
    mesh=AXES,
    device_ids=(0, 1, 2, 3, 4, 5, 6, 7),
    versions={"jax": "0.12.0"},
    flags=Flags(requested=("--a",), effective=("--a",), rejected=(("--b", "unknown flag"),)),
    autotuned=False,
)


def test_the_document_is_the_contract() -> None:
    assert analyze(NAMED, axes=AXES).to_json() == {
        "schema": "shardlab.analysis/1",
        "module": {"name": "jit_c07", "backend": "unknown", "num_devices": 8, "scheduled": True},
        "mesh": {"data": 2, "model": 4},
        "collectives": [
            {
                "name": "c",
                "kind": "all-reduce",
                "axes": ["model"],
                "tier": None,
                "group_size": 4,
                "num_groups": 2,
                "executions": [1, 1],
                "asynchronous": False,
                "dtypes": ["f32"],
                "payload_bytes": 4096,
                "wire_bytes": 6144,
                "fabric_bytes": 49152,
                "phase": "backward",
                "op_name": "jit(step)/transpose(jvp(layers))/mlp/down/dot_general",
                "layer": "layers/mlp/down",
                "source": "transformer.py:112",
            }
        ],
        "totals": {
            "payload_bytes": [4096, 4096],
            "wire_bytes": [6144, 6144],
            "by_kind": {"all-reduce": {"payload_bytes": [4096, 4096], "wire_bytes": [6144, 6144]}},
            "by_axes": {"model": {"payload_bytes": [4096, 4096], "wire_bytes": [6144, 6144]}},
            "by_phase": {"backward": {"payload_bytes": [4096, 4096], "wire_bytes": [6144, 6144]}},
            "by_layer": {"layers/mlp/down": {"payload_bytes": [4096, 4096], "wire_bytes": [6144, 6144]}},
        },
        "ledger": [],
        "made_by": {},
    }


def test_a_machine_adds_tiers_traffic_and_time() -> None:
    found = analyze(PLAIN, axes=AXES, machine=load_machine("h100:1x8")).to_json()
    (row,) = found["collectives"]
    assert found["machine"] == "h100:1x8"
    assert (row["tier"], row["traffic"]) == ("nvlink", {"nvlink": 6144})
    assert row["time_s"] == row["latency_s"] + max(row["tier_s"].values())
    assert row["latency_s"] > max(row["tier_s"].values()) > 0  # 6,144 B: nearly all of it is waiting
    assert row["algorithm"]["from"] == "model"
    assert found["totals"]["traffic"] == {"nvlink": [6144, 6144]}


def test_fractional_bytes_are_numbers_and_whole_ones_integers() -> None:
    (row,) = analyze(UNEVEN, axes=AXES).to_json()["collectives"]
    assert row["wire_bytes"] == 6553.6
    assert isinstance(row["fabric_bytes"], int | float)
    assert (row["axes"], row["axes_reason"]) == (None, "groups of different sizes (3, 5)")


@pytest.mark.parametrize(
    "text", [PLAIN, NAMED, UNEVEN, CONDITIONAL, UNKNOWN], ids=["plain", "named", "uneven", "cond", "dyn"]
)
@pytest.mark.parametrize("machine", [None, "h100:1x8"])
def test_the_document_comes_back_equal(text: str, machine: str | None) -> None:
    found = analyze(text, axes=AXES, machine=load_machine(machine) if machine else None)
    document = json.loads(json.dumps(found.to_json()))
    assert analysis_from_json(document) == found
    assert list(document["collectives"][0]) == list(found.to_json()["collectives"][0])


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"schema": "shardlab.report/1"},
        {"schema": "shardlab.analysis/1"},
        {"schema": "shardlab.analysis/1", "module": 3},
    ],
)
def test_other_documents_are_refused_in_one_line(document: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="not an analysis"):
        analysis_from_json(document)


def test_every_kind_of_source_gives_the_same(tmp_path: Path) -> None:
    path = tmp_path / "f.hlo"
    path.write_text(PLAIN)
    (module,) = parse(PLAIN)
    expected = analyze(PLAIN, axes=AXES)
    for source in (path, str(path), PLAIN.encode(), module, [path]):
        assert analyze(source, axes=AXES) == expected


def test_a_saved_program_brings_its_own_mesh_and_facts(tmp_path: Path) -> None:
    path = tmp_path / "plan.program"
    save(PROGRAM, path)
    found = analyze(path)
    assert found == analyze(PROGRAM)
    assert (found.mesh, found.modules[0].backend, found.collectives[0].axes) == (AXES, "cpu", ("model",))
    assert found.made_by == {
        "versions": {"jax": "0.12.0"},
        "flags": {"requested": ["--a"], "effective": ["--a"], "rejected": [["--b", "unknown flag"]]},
        "device_order": "row-major",
        "autotuned": False,
    }


def test_stock_flags_and_another_device_order_are_recorded() -> None:
    stock = replace(PROGRAM, flags=Flags(), device_ids=(1, 0, 2, 3, 4, 5, 6, 7), autotuned=None)
    found = analyze(stock).made_by
    assert (found["flags"], found["device_order"]) == ("stock", [1, 0, 2, 3, 4, 5, 6, 7])
    assert "autotuned" not in found


def test_device_ids_change_tiers_and_never_axes() -> None:
    machine = load_machine("h100:2x8")
    text = PLAIN.replace("num_partitions=8", "num_partitions=16").replace("'data'=2", "'data'=4")
    mesh = {"data": 4, "model": 4}
    inside = analyze(text, axes=mesh, machine=machine).collectives[0]
    crossing = [8 * (i % 2) + i // 2 for i in range(16)]  # neighbours in the mesh stand in different hosts
    across = analyze(text, axes=mesh, machine=machine, device_ids=crossing).collectives[0]
    assert inside.axes == across.axes == ("model",)
    assert (inside.tier, across.tier) == ("nvlink", "infiniband")


def test_several_modules_make_one_document() -> None:
    second = UNEVEN.replace("HloModule jit_c20", "HloModule jit_g")
    found = analyze(f"{PLAIN}\n{second}", axes=AXES)
    document = found.to_json()
    assert [module["name"] for module in document["modules"]] == ["jit_c07", "jit_g"]
    assert "module" not in document
    assert [row["module"] for row in document["collectives"]] == ["jit_c07", "jit_g"]
    assert found.totals.wire_bytes[0] == 6_144 + Fraction(32_768, 5)
    assert found.totals.by_axes["unknown"]["payload_bytes"] == (4_096, 4_096)
    assert analysis_from_json(document) == found


def test_several_files_are_merged_and_unknown_stays_unknown(tmp_path: Path) -> None:
    paths = [tmp_path / "a.hlo", tmp_path / "b.hlo"]
    for path, text in zip(paths, (PLAIN, UNKNOWN), strict=True):
        path.write_text(text)
    found = analyze(paths, axes=AXES)
    assert found == merge([analyze(path, axes=AXES) for path in paths])
    assert found.totals.wire_bytes == (6_144, None)
    assert [entry.what for entry in found.ledger] == ["while"]


def test_merging_nothing_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="nothing"):
        merge([])


def test_totals_are_the_sum_over_rows_where_nothing_branches() -> None:
    found = analyze(GOLDEN / "d14_nested.hlo", axes=AXES)
    sent = sum(row.executions[0] * row.wire_bytes for row in found.collectives)
    assert found.totals.wire_bytes == (sent, sent) == (139_264, 139_264)
    for table in (found.totals.by_kind, found.totals.by_axes, found.totals.by_phase, found.totals.by_layer):
        assert sum(amounts["wire_bytes"][0] for amounts in table.values()) == sent


def test_without_axes_groups_are_reported_and_the_reason_said() -> None:
    (row,) = analyze(PLAIN).collectives
    assert (row.axes, row.axes_reason, row.group_size, row.num_groups) == (
        None,
        "no mesh axes were given",
        4,
        2,
    )


@pytest.mark.parametrize(
    ("axes", "over"),
    [
        ({"a": 1, "data": 2, "b": 1, "model": 4, "c": 1}, ("model",)),
        ({"all": 8}, ("all:(2)4",)),
        ({"x": 2, "y": 2, "z": 2}, ("y", "z")),
        ({"slices": 1, "all": 8, "tensor": 1}, ("all:(2)4",)),
    ],
    ids=["axes-of-one", "one-axis", "three-axes", "one-axis-of-more-than-one"],
)
def test_axes_are_those_of_the_mesh_that_is_given(axes: dict[str, int], over: tuple[str, ...]) -> None:
    (row,) = analyze(PLAIN, axes=axes).collectives
    assert (row.axes, row.group_size, row.wire_bytes) == (over, 4, 6_144)


@pytest.mark.parametrize("axes", [{"only": 1}, {"a": 1, "b": 1}, None])
def test_one_device_sends_nothing(axes: dict[str, int] | None) -> None:
    text = PLAIN.replace(", num_partitions=8", "").replace("mesh['data'=2,'model'=4] {'model'}", "{{0}}")
    found = analyze(text, axes=axes)
    (row,) = found.collectives
    assert (row.axes, row.wire_bytes, found.modules[0].num_devices) == ((), 0, 1)
    assert found.ledger == ()


def test_many_devices_and_no_collective_is_said() -> None:
    text = "HloModule m, num_partitions=8\n\nENTRY %main {\n  ROOT %x = f32[] parameter(0)\n}\n"
    (entry,) = analyze(text).ledger
    assert (entry.what, entry.name) == ("module", "m")
    assert "8 devices" in entry.why
    assert analyze(text.replace(", num_partitions=8", "")).ledger == ()


def test_a_refused_program_says_so() -> None:
    with pytest.raises(UserError, match="refused"):
        analyze(replace(PROGRAM, hlo_text=""))


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_empty_text_is_an_error(text: str) -> None:
    with pytest.raises(UserError, match="empty"):
        analyze(text)


@pytest.mark.parametrize("cut", range(40, len(PLAIN) - 2, 97))
def test_a_cut_text_is_an_error_with_a_place_never_a_number(cut: int) -> None:
    with pytest.raises(ParseError) as raised:
        analyze(PLAIN[:cut] + "\n", axes=AXES)
    assert raised.value.line > 0


def test_an_undefined_operand_is_an_error_with_its_line() -> None:
    with pytest.raises(ParseError, match="%y is not defined") as raised:
        analyze(PLAIN.replace("all-reduce(%p)", "all-reduce(%y)"), axes=AXES)
    assert raised.value.line == 11


def test_an_unbounded_extent_is_on_the_ledger_not_in_the_sum() -> None:
    text = PLAIN.replace("f32[1024]{0} parameter", "f32[?]{0} parameter")
    found = analyze(text, axes=AXES)
    assert found.collectives == ()
    assert [entry.what for entry in found.ledger if "size" in entry.why] == ["all-reduce"]


def test_bounded_extents_are_an_upper_bound() -> None:
    (row,) = analyze(
        PLAIN.replace("f32[1024]{0} parameter", "f32[<=1024]{0} parameter"), axes=AXES
    ).collectives
    assert (row.bound, row.payload_bytes) == ("upper", 4_096)


FORBIDDEN = ("jax", "jaxlib", "flax", "numpy", "pydantic", "rich", "jinja2", "zstandard")


@pytest.mark.parametrize(
    "first", ["import shardlab", "from shardlab import analyze; analyze(TEXT)"], ids=["import", "analyze"]
)
def test_analysis_imports_nothing_heavy(first: str) -> None:
    code = (
        "import sys\nclass Wall:\n    def find_spec(self, name, *rest):\n"
        f"        assert name.split('.')[0] not in {FORBIDDEN!r}, name\n"
        f"sys.meta_path.insert(0, Wall())\nTEXT = {PLAIN!r}\n{first}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_public_names() -> None:
    assert shardlab.analyze is analyze
    assert shardlab.Analysis is Analysis
    assert shardlab.load_mesh(Path(__file__).parents[1] / "meshes" / "cpu8-fsdp.toml").axes == {"fsdp": 8}
    assert {"analyze", "load_mesh"} <= set(dir(shardlab))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = shardlab.no_such_name
