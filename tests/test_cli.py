"""The command line: exit codes, one line per mistake, nothing but the document on standard output."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from case_reports import report

from shardlab import program as programs
from shardlab.cli import main
from shardlab.compare import rank

PLAN = """\
description = "FSDP over two emulated devices"
on = "cpu:2"
[axes]
fsdp = 2
[params]
embed = ["fsdp"]
[activations]
batch = ["fsdp"]
"""
# One all-reduce of 4 f32 over both devices: 2 · (2-1)/2 · 16 bytes = 16 on the wire.
HLO = """\
HloModule m, num_partitions=2

add {
  a = f32[] parameter(0)
  b = f32[] parameter(1)
  ROOT c = f32[] add(a, b)
}

ENTRY main {
  p = f32[4]{0} parameter(0)
  ROOT r = f32[4]{0} all-reduce(p), channel_id=1,
    replica_groups={{0,1}}, use_global_device_ids=true, to_apply=add
}
"""
OPAQUE = HLO.replace(
    "ROOT r", 'k = f32[4]{0} custom-call(p), custom_call_target="nvshmem_put"\n  ROOT r'
).replace("all-reduce(p)", "all-reduce(k)")

SLICED = str(Path(__file__).parent / "golden" / "audit" / "gather_then_slice.tpu.hlo")


@pytest.fixture
def plan(tmp_path: Path) -> str:
    return written(tmp_path / "plan.toml", PLAN)


@pytest.fixture
def hlo(tmp_path: Path) -> str:
    return written(tmp_path / "m.txt", HLO)


def written(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def run(*argv: str) -> int:
    try:
        return main(argv)
    except SystemExit as error:  # argparse
        assert isinstance(error.code, int)
        return error.code


def mistakes(capsys: pytest.CaptureFixture[str], *argv: str) -> list[str]:
    """The lines on standard error of a command that must exit 2 and print nothing else."""
    assert run(*argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err.splitlines()


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (("[params]", "[parms]"), [r"plan\.toml:5: parms: .*params"]),
        (("fsdp = 2", 'fsdp = "two"'), [r"plan\.toml:4: axes\.fsdp: .*"]),
        (("cpu:2", "cpu:3"), [r"plan\.toml:3: axes: .*cpu:3 has 3"]),
        (("cpu:2", "h100:1x99x7"), [r"plan\.toml:2: on: .*h100"]),
        (('embed = ["fsdp"]', 'embed = ["tensor"]'), [r"plan\.toml:6: params\.embed: .*tensor"]),
        (("[axes]", "[axes"), [r"plan\.toml:3: not TOML.*"]),
    ],
    ids=["unknown-key", "wrong-type", "device-count", "impossible-topology", "no-such-axis", "not-toml"],
)
def test_a_wrong_mesh_file_is_one_line_per_mistake(
    change: tuple[str, str], wanted: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "plan.toml", PLAN.replace(*change))
    for verb in ("explain", "compare"):
        lines = mistakes(capsys, verb, path, "--model", "tiny")
        assert len(lines) == len(wanted), lines
        for line, pattern in zip(lines, wanted, strict=True):
            assert re.search(pattern, line), line


def test_all_mistakes_of_all_files_come_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = written(tmp_path / "one.toml", PLAN.replace("[params]", "[parms]").replace("cpu:2", "cpu:3"))
    two = written(tmp_path / "two.toml", PLAN.replace("fsdp = 2", "fsdp = 0"))
    lines = mistakes(capsys, "compare", one, two, str(tmp_path / "three.toml"), "--model", "tiny")
    assert len([line for line in lines if "one.toml" in line]) == 2
    assert any("two.toml:4" in line for line in lines)
    assert any("three.toml" in line for line in lines)


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (("--model", "gpt2-124"), [r"--model: unknown model 'gpt2-124'.*gpt2-124m"]),
        (("--model", "tiny", "--on", "h100:1x99"), [r"h100:1x99"]),
        (("--model", "tiny", "--on", "v5p:7x7x7x7"), [r"v5p:7x7x7x7"]),
        (("--model", "tiny", "--on", "nosuch:8"), [r"nosuch"]),
        (("--model", "tiny", "--on", "cpu:4"), [r"plan.*2.*cpu:4 has 4"]),
        (("--model", "nope", "--on", "nosuch:8"), [r"nope", r"nosuch"]),
        ((), [r"--model: .*give --model"]),
        (("--model", "tiny", "--batch", "0"), [r"--batch: '0' is not a whole number above 0"]),
        (("--model", "tiny", "--seq", "x"), [r"--seq: 'x' is not a whole number above 0"]),
        (("--model", "tiny", "--workload", "sleep"), [r"--workload: invalid choice: 'sleep'"]),
        (("--model", "tiny", "--nope"), [r"unrecognized arguments: --nope"]),
    ],
    ids=[
        "unknown-model", "impossible-hosts", "impossible-torus", "unknown-machine", "wrong-size",
        "two-at-once", "no-model", "batch", "seq", "workload", "flag",
    ],
)  # fmt: skip
def test_wrong_flags_are_one_line_per_mistake(
    argv: tuple[str, ...], wanted: list[str], plan: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for verb in ("explain", "compare"):
        lines = mistakes(capsys, verb, plan, *argv)
        assert len(lines) == len(wanted), lines
        for line, pattern in zip(lines, wanted, strict=True):
            assert re.search(pattern, line), line


@pytest.mark.parametrize("verb", ["explain", "compare"])
def test_a_missing_extra_names_the_command_that_installs_it(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib import metadata

    def nothing(package: str) -> str:
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", nothing)
    path = written(tmp_path / "plan.toml", PLAN.replace("cpu:2", "v5e:2x2").replace("fsdp = 2", "fsdp = 4"))
    *progress, line = mistakes(capsys, verb, path, "--model", "tiny")
    assert line.startswith("target v5e:2x2: not installed: ")
    assert line.endswith("pip install 'shardlab[tpu]'")
    assert progress == ["[1/1] plan on v5e:2x2: failed"]


def test_a_folder_that_cannot_be_written_is_found_before_the_compile(
    plan: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = str(tmp_path / "nowhere" / "x")
    started = time.monotonic()
    (line,) = mistakes(capsys, "explain", plan, "--model", "tiny", "--save", target)
    assert line == f"{target}: cannot be written; give a file in a directory that exists"
    assert time.monotonic() - started < 2


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


@pytest.mark.parametrize("verb", ["analyze", "explain", "compare", "doctor"])
def test_help_has_no_flag_that_is_not_built(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(verb, "--help") == 0
    text = capsys.readouterr().out
    assert f"usage: shardlab {verb}" in text
    for flag in ("--html", "--trace", "--why"):
        assert flag not in text
    assert ("--order" in text) == (verb in ("analyze", "explain"))


def test_help_lists_the_verbs_that_are_built(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    text = capsys.readouterr().out
    for verb in ("analyze", "explain", "compare", "doctor"):
        assert f"  {verb} " in text
    for verb in ("diff", "check", "fit", "search", "record"):
        assert f"  {verb} " not in text


@pytest.mark.tpu
@pytest.mark.gpu
def test_doctor_proves_a_target_by_compiling_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor", "--deep", "--json") == 0
    found = {status["target"]: status for status in json.loads(capsys.readouterr().out)["targets"]}
    for target in ("cpu", "tpu", "gpu"):
        assert found[target]["works"] and "compiled for" in found[target]["detail"]


def test_doctor_lists_every_family(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert {"cpu", "tpu", "gpu", "attached"} <= {status["target"] for status in document["targets"]}
    assert run("doctor") == 0
    assert "cpu" in capsys.readouterr().out


def test_ctrl_c_is_130_and_no_traceback(
    plan: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shardlab.lab.study.compare_plans", interrupted)
    assert run("compare", plan, "--model", "tiny") == 130
    assert capsys.readouterr() == ("", "interrupted\n")


def test_a_terminal_without_unicode_gets_escapes_not_a_traceback(tmp_path: Path) -> None:
    text = HLO.replace("to_apply=add", 'to_apply=add, metadata={op_name="jit(step)/größe/psum"}')
    path = written(tmp_path / "m.txt", text)
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    outputs = []
    for flag in ("--json", "--markdown"):
        command = [sys.executable, "-m", "shardlab", "analyze", path, flag]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        outputs.append(done.stdout)
    assert json.loads(outputs[0])["collectives"][0]["op_name"] == "jit(step)/größe/psum"
    assert "gr\\xf6\\xdfe" in outputs[1]


def test_a_reader_that_leaves_is_no_error(hlo: str) -> None:
    """`shardlab analyze … | head -0`: the pipe is closed before anything is written."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as gone:
        command = [sys.executable, "-m", "shardlab", "analyze", hlo, "--json"]
        done = subprocess.run(command, stdout=gone, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("flag", ["--json", "--markdown", ""], ids=["json", "markdown", "terminal"])
def test_compare_prints_only_the_report_on_standard_output(
    flag: str, plan: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = rank([report("fast", 1.0), report("slow", 2.0)])
    monkeypatch.setattr("shardlab.lab.study.compare_plans", lambda *args, **named: made)
    assert run("compare", plan, "--model", "tiny", *([flag] if flag else [])) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.index("fast") < out.index("slow")
    if flag == "--json":
        assert [row["rank"] for row in json.loads(out)["reports"]] == [1, 2]


def test_an_infeasible_plan_is_an_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """GPT-2 has 12 heads: over 8 devices they cannot go."""
    text = PLAN.replace("cpu:2", "cpu:8").replace("fsdp = 2", "fsdp = 8")
    text = text.replace('embed = ["fsdp"]', 'heads = ["fsdp"]').replace('batch = ["fsdp"]', "")
    path = written(tmp_path / "heads.toml", text)
    assert run("explain", path, "--model", "gpt2-124m", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert "12 heads" in document["infeasible"]
    assert "analysis" not in document
    assert run("compare", path, "--model", "gpt2-124m") == 0
    assert "12 heads" in capsys.readouterr().out


def test_explain_compiles_saves_and_agrees_with_analyze(
    plan: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved, hlo = tmp_path / "step.program", tmp_path / "step.txt"
    argv = ("explain", plan, "--model", "tiny", "--json", "--save", str(saved), "--hlo", str(hlo))
    assert run(*argv) == 0
    explained = json.loads(capsys.readouterr().out)
    assert explained["schema"] == "shardlab.report/1"
    assert explained["case"]["batch"] == 2  # one sequence per batch shard
    assert "fits" not in explained["memory"]  # emulated devices have no memory of their own
    assert run("analyze", str(saved), "--json", "--audit") == 0
    from_program = json.loads(capsys.readouterr().out)
    assert explained["audit"] == from_program["audit"]
    assert run("analyze", str(hlo), "--axes", "fsdp=2", "--json") == 0
    from_text = json.loads(capsys.readouterr().out)
    totals = explained["analysis"]["totals"]["wire_bytes"]
    assert totals[0] > 0
    assert from_program["totals"]["wire_bytes"] == totals
    assert from_text["totals"]["wire_bytes"] == totals


def test_ctrl_c_in_a_compile_leaves_no_process_and_no_file(plan: str, tmp_path: Path) -> None:
    """A real interrupt of a real compile: exit 130 within seconds, no child, nothing half-written."""
    target = tmp_path / "out" / "step.program"
    target.parent.mkdir()
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "shardlab", "explain", plan, "--model", "tiny", "--save", str(target)]
    environment = {**os.environ, "TMPDIR": str(scratch)}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as running:
        deadline = time.monotonic() + 60
        while not list(scratch.glob("shardlab-compile-*/log")) and time.monotonic() < deadline:
            time.sleep(0.02)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=30)
    assert running.returncode == 130
    assert (out, err.decode().splitlines()[-1:]) == (b"", ["interrupted"])
    assert list(target.parent.iterdir()) == []
    assert list(scratch.glob("shardlab-compile-*/")) == []
