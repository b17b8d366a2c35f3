"""`shardlab analyze` from the command line: one line per mistake, one document, exit codes."""

from __future__ import annotations

import gzip
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard
from command_line import HLO, OPAQUE, PLAN, mistakes, run, written
from samples import sample

from shardlab import program as programs

SLICED = str(Path(__file__).parent / "golden" / "audit" / "gather_then_slice.tpu.hlo")


@pytest.fixture
def plan(tmp_path: Path) -> str:
    return written(tmp_path / "plan.toml", PLAN)


@pytest.fixture
def hlo(tmp_path: Path) -> str:
    return written(tmp_path / "m.txt", HLO)


@pytest.mark.parametrize(
    ("name", "content", "pattern"),
    [
        ("empty.txt", b"", r"empty\.txt"),
        ("empty.pb", b"", r"empty\.pb"),
        ("cut.txt", HLO[: HLO.index("ROOT r")].encode(), r"cut\.txt"),
        ("mid.txt", HLO[: HLO.index("all-reduce") + 4].encode(), r"mid\.txt"),
        ("cut.gz", gzip.compress(HLO.encode(), mtime=0)[:-20], r"cut\.gz"),
        ("cut.zst", b"\x28\xb5\x2f\xfd\x04", r"cut\.zst"),
        ("prose.txt", b"Dear compiler, all-reduce(this)", r"prose\.txt"),
        ("noise.bin", bytes(range(256)) * 4, r"noise\.bin"),
        ("other.json", b'{"schema": "something else"}', r"other\.json"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value and "\\" not in value else "",
)
def test_a_dump_that_cannot_be_read_is_one_line(
    name: str, content: bytes, pattern: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    (line,) = mistakes(capsys, "analyze", str(path))
    assert re.search(pattern, line)


def test_a_missing_file_and_a_folder_without_dumps_are_one_line_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path / "notes.md", "nothing here")
    (line,) = mistakes(capsys, "analyze", str(tmp_path))
    assert str(tmp_path) in line
    (line,) = mistakes(capsys, "analyze", str(tmp_path / "missing.txt"))
    assert "missing.txt" in line


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (("--axes", "data"), ["--axes: 'data' is not NAME=SIZE; write it as data=4,model=2"]),
        (
            ("--axes", "a=2,a=2,b=x"),
            [
                "--axes: 'a' is given twice; write it as data=4,model=2",
                "--axes: 'b=x' is not NAME=SIZE; write it as data=4,model=2",
            ],
        ),
        (
            ("--axes", "a=" + "9" * 5000),
            ["--axes: 'a=" + "9" * 5000 + "' is not NAME=SIZE; write it as data=4,model=2"],
        ),
        (("--device-ids", "0,x"), ["--device-ids: 'x' is not a device id; write 0,1,2,3"]),
        (("--device-ids", "0,0"), ["--device-ids: a device comes twice; list each device of the mesh once"]),
    ],
    ids=["no-size", "twice", "huge", "not-a-number", "twice-a-device"],
)
def test_wrong_axes_and_ids(
    argv: tuple[str, ...], wanted: list[str], hlo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mistakes(capsys, "analyze", hlo, *argv) == wanted


@pytest.mark.parametrize("axes", ["data=3", "data=1,model=5"], ids=["three", "five"])
def test_axes_that_do_not_hold_the_devices_are_a_mistake(
    axes: str, hlo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (line,) = mistakes(capsys, "analyze", hlo, "--axes", axes)
    assert re.search(r"compiled for 2;", line)


def test_analyze_json_is_one_document_and_nothing_else(hlo: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("analyze", hlo, "--axes", "data=2", "--json") == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert err == ""
    assert document["schema"] == "shardlab.analysis/1"
    assert document["mesh"] == {"data": 2}
    assert [(row["kind"], row["axes"], row["wire_bytes"]) for row in document["collectives"]] == [
        ("all-reduce", ["data"], 16)
    ]


def test_analyze_reads_standard_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(gzip.compress(HLO.encode(), mtime=0))))
    assert run("analyze", "-", "--json") == 0
    assert json.loads(capsys.readouterr().out)["totals"]["wire_bytes"] == [16, 16]


def test_analyze_takes_axes_from_a_mesh_file(plan: str, hlo: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("analyze", hlo, "--mesh", plan, "--json") == 0
    assert json.loads(capsys.readouterr().out)["collectives"][0]["axes"] == ["fsdp"]


def test_analyze_prices_on_a_machine(hlo: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("analyze", hlo, "--on", "h100:1x2", "--json") == 0
    row = json.loads(capsys.readouterr().out)["collectives"][0]
    assert (row["tier"], row["traffic"]) == ("nvlink", {"nvlink": 16})


def test_analyze_of_a_saved_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "step.program"
    programs.save(
        programs.Program(name="m", backend="cpu", hlo_text=HLO, num_devices=2, mesh={"data": 2}), path
    )
    assert run("analyze", str(path), "--json") == 0
    assert json.loads(capsys.readouterr().out)["collectives"][0]["axes"] == ["data"]


def test_analyze_of_several_paths_is_one_document(hlo: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("analyze", hlo, hlo, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["modules"]) == 2
    assert document["totals"]["wire_bytes"] == [32, 32]


def test_audit_is_a_member_of_the_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("analyze", SLICED, "--axes", "x=4,y=2", "--json") == 0
    assert "audit" not in json.loads(capsys.readouterr().out)
    assert run("analyze", SLICED, "--axes", "x=4,y=2", "--json", "--audit") == 0
    (finding,) = json.loads(capsys.readouterr().out)["audit"]
    assert (finding["rule"], finding["axes"]) == ("gathered-then-sliced", ["x", "y"])
    assert finding["wire_bytes"] == [7 * 131_072 - 65_536] * 2


@pytest.mark.parametrize("flags", [(), ("--markdown",)], ids=["terminal", "markdown"])
def test_audit_is_a_table(flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("analyze", SLICED, "--axes", "x=4,y=2", *flags) == 0
    assert "Audit" not in capsys.readouterr().out
    assert run("analyze", SLICED, "--axes", "x=4,y=2", "--audit", *flags) == 0
    text = capsys.readouterr().out
    assert "Audit" in text
    assert "852 kB" in text


def test_an_audit_that_finds_nothing_says_so(hlo: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("analyze", hlo, "--audit") == 0
    assert "nothing found" in capsys.readouterr().out
    assert run("analyze", hlo, "--audit", "--json") == 0
    assert json.loads(capsys.readouterr().out)["audit"] == []


def test_strict_is_exit_1_when_something_was_not_counted(
    hlo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opaque = written(tmp_path / "opaque.txt", OPAQUE)
    assert [run("analyze", path, *strict) for path in (hlo, opaque) for strict in ((), ("--strict",))] == [
        0, 0, 0, 1,
    ]  # fmt: skip
    assert "nvshmem_put" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [("all-reduce(p)", "all-reduce(gone)", 11), ("{{0,1}}", "{{0,7}}", 11), ("ROOT c = f32[]", "ROOT", 6)],
    ids=["operand", "group", "syntax"],
)
def test_an_error_names_the_file_and_the_line_whatever_stage_finds_it(
    old: str, new: str, line: int, hlo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = written(tmp_path / "damaged.hlo", HLO.replace(old, new))
    (said,) = mistakes(capsys, "analyze", hlo, damaged)
    assert re.match(rf"{re.escape(damaged)}:{line}:[0-9]+: ", said)


NOTHING = "HloModule quiet, num_partitions=8\n\nENTRY main {\n  ROOT p = f32[4]{0} parameter(0)\n}\n"


@pytest.mark.parametrize("flags", [(), ("--markdown",)], ids=["terminal", "markdown"])
def test_many_devices_and_nothing_between_them_is_said_out_loud(
    flags: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet = written(tmp_path / "quiet.hlo", NOTHING)
    assert run("analyze", quiet, *flags) == 0
    assert "compiled for 8 devices, but no collective was found" in capsys.readouterr().out
    assert run("analyze", quiet, "--strict", *flags) == 1
    one = written(tmp_path / "one.hlo", NOTHING.replace("=8", "=1"))
    assert run("analyze", one, "--strict", *flags) == 0


FORBIDDEN = ("jax", "jaxlib", "flax", "optax", "numpy")
STARTED = """
import sys
class Wall:
    def find_spec(self, name, *rest):
        assert name.split(".")[0] not in {forbidden!r}, name
sys.meta_path.insert(0, Wall())
from shardlab.cli import main
code = main({argv!r})
assert not set(sys.modules) & set({forbidden!r})
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("form", "flags"),
    [
        ("text", ("--json",)),
        ("text", ("--axes", "data=2", "--on", "h100:1x2", "--audit", "--order")),
        ("text", ("--markdown", "--strict")),
        ("gz", ("--json",)),
        ("zst", ("--json",)),
        ("proto", ("--json", "--audit")),
        ("folder", ("--json",)),
        ("program", ("--json",)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_analyze_starts_without_jax(form: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    """In a process of its own, whose modules are looked at when it is done."""
    path = tmp_path / "module_0001.m.cpu_after_optimizations.txt"
    data = HLO.encode()
    if form == "program":
        made = programs.Program(name="m", backend="cpu", hlo_text=HLO, num_devices=2, mesh={"data": 2})
        programs.save(made, path)
    else:
        path.write_bytes(
            {"gz": gzip.compress(data, mtime=0), "zst": zstandard.ZstdCompressor().compress(data)}.get(
                form, sample("permuted_mesh.hlo_module.pb") if form == "proto" else data
            )
        )
    argv = ["analyze", str(path.parent if form == "folder" else path), *flags]
    code = STARTED.format(forbidden=FORBIDDEN, argv=argv)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "all-reduce" in done.stdout


def test_a_mesh_file_needs_no_jax_either(plan: str, hlo: str) -> None:
    code = STARTED.format(forbidden=FORBIDDEN, argv=["analyze", hlo, "--mesh", plan, "--json"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
