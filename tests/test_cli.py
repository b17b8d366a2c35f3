"""The command line: exit codes, one line per mistake, nothing but the document on standard output."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from case_reports import report
from command_line import HLO, PLAN, mistakes, run, written

from shardlab.arguments import parser, with_paths
from shardlab.compare import rank
from shardlab.report.page import Column, Page, Table, cell
from shardlab.report.terminal import print_page


@pytest.fixture
def plan(tmp_path: Path) -> str:
    return written(tmp_path / "plan.toml", PLAN)


@pytest.fixture
def hlo(tmp_path: Path) -> str:
    return written(tmp_path / "m.txt", HLO)


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


@pytest.mark.parametrize("verb", ["analyze", "explain", "compare", "doctor"])
def test_help_has_the_flags_of_the_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(verb, "--help") == 0
    text = capsys.readouterr().out
    assert f"usage: shardlab {verb}" in text
    for flag in ("--order", "--why"):
        assert (flag in text) == (verb in ("analyze", "explain"))
    assert ("--html" in text) == (verb != "doctor")


VERBS = [
    "analyze", "explain", "compare", "fit", "search", "diff", "check", "record", "doctor", "completion",
]  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_has_examples_that_parse(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every line that begins with `shardlab VERB`, up to two blanks, a comment or another command."""
    assert run(verb, "--help") == 0
    _, _, examples = capsys.readouterr().out.partition("examples:\n")
    commands = [line.strip() for line in examples.splitlines() if line.strip().startswith(f"shardlab {verb}")]
    assert commands or f"shardlab {verb}" in examples
    for command in commands:
        words = shlex.split(re.split(r" {2,}| > |#", command)[0])
        assert parser().parse_args(with_paths(words[1:])).verb == verb


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_every_verb_and_flag(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("completion", shell) == 0
    script = capsys.readouterr().out
    assert all(verb in script for verb in VERBS)
    for flag in ("--html", "--why", "--device-ids", "--tolerance", "llama3-70b"):
        assert flag.removeprefix("--") in script


def test_bash_completes_a_flag_and_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In bash itself: what a TAB offers after `shardlab explain plan.toml --w` and `--model llama3-4`."""
    assert run("completion", "bash") == 0
    script = written(tmp_path / "completion.sh", capsys.readouterr().out)
    ask = (
        f'source {script}; offer() {{ COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); '
        '_shtab_shardlab; echo "${COMPREPLY[@]}"; }; '
        "offer shardlab explain plan.toml --w; offer shardlab explain plan.toml --model llama3-4"
    )
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["--workload --why", "llama3-405b"], done.stderr


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environment", "coloured"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)],
    ids=["terminal", "no-color", "dumb"],
)
def test_colour_is_for_terminals_that_want_it(
    environment: dict[str, str], coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"TERM": "xterm-256color"} | environment).items():
        monkeypatch.setenv(name, value)
    page = Page(title="T", tables=(Table(title="x", columns=(Column("a"),), rows=((cell("bad", "bad"),),)),))
    stream = Terminal()
    print_page(page, stream, 80)
    assert ("\x1b[31m" in stream.getvalue()) == coloured


def test_help_lists_the_verbs_that_are_built(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    text = capsys.readouterr().out
    for verb in VERBS:
        assert re.search(rf"^ +{verb}\s", text, re.MULTILINE)


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


# A shell starts what it runs in the background with interrupts ignored, and children inherit that. Said in
# the child, not in a preexec_fn: that would fork this process, and jax, where a test has loaded it, warns of
# forks.
_INTERRUPTIBLE = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)


def test_ctrl_c_in_a_compile_leaves_no_process_and_no_file(plan: str, tmp_path: Path) -> None:
    """A real interrupt of a real compile: exit 130 within seconds, no child, nothing half-written."""
    target = tmp_path / "out" / "step.program"
    target.parent.mkdir()
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    explain = [sys.executable, "-m", "shardlab", "explain", plan, "--model", "tiny", "--save", str(target)]
    command = [sys.executable, "-c", _INTERRUPTIBLE, *explain]
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
