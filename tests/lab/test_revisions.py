"""`shardlab diff` between revisions, on real repositories of two commits and tiny plans."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import HLO, PLAN, mistakes, run
from lab.repositories import commit, repository

import shardlab
from shardlab.compile.versions import BUILDERS
from shardlab.errors import CompileFailed
from shardlab.lab.cache import Cache
from shardlab.lab.run import Steps
from shardlab.program import Memory, Program, to_bytes
from shardlab.spec.case import Case
from shardlab.spec.step import AnyCase

DATA = Path(shardlab.__file__).parent / "hardware" / "data"
CHECK = '[check]\nmodel = "tiny"\nbatch = 2\nseq = 8\n'
PLAN_8 = PLAN + CHECK
PLAN_16 = PLAN_8.replace("seq = 8", "seq = 16")
FOUR = PLAN_8.replace("cpu:2", "cpu:4").replace("fsdp = 2", "fsdp = 4").replace("batch = 2", "batch = 4")


class Compiler:
    """Stands in for the compiler: an all-reduce of as many f32 as the case has tokens a sequence."""

    def __init__(self) -> None:
        self.compiled: list[tuple[str, str]] = []

    def steps(self, **_: object) -> Steps:
        return Steps(key=lambda case: f"{case.plan.path} {case.machine}", compile=self.compile)

    def compile(self, case: AnyCase) -> Program:
        self.compiled.append((case.plan.name, case.machine))
        seq = case.seq if isinstance(case, Case) else int((Path(case.folder) / "mystep.py").read_text()[-3:])
        if case.plan.description == "breaks the compiler":
            raise CompileFailed(case.plan.name, "the compiler crashed")
        return Program(
            name=case.plan.name,
            backend="cpu",
            hlo_text=HLO.replace("f32[4]", f"f32[{seq}]"),
            num_devices=2,
            mesh={"fsdp": 2},
            memory=Memory(argument_bytes=1000 * seq, output_bytes=0, alias_bytes=0, temp_bytes=0),
        )


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    made = Compiler()
    monkeypatch.setattr(Cache, "steps", lambda self, **_: made.steps())
    return made


Told = Callable[..., dict[str, Any]]


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Told:
    def of(*argv: str) -> dict[str, Any]:
        assert run("diff", *argv, "--json") == 0
        document: dict[str, Any] = json.loads(capsys.readouterr().out)
        assert document["schema"] == "shardlab.change/1"
        return document

    return of


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    def made(*commits: Mapping[str, str | None]) -> Path:
        folder = repository(tmp_path / "repo", *commits)
        monkeypatch.chdir(folder)
        return folder

    return made


def verdicts(document: dict[str, Any]) -> dict[tuple[str, str], str]:
    return {(one["plan"], one["machine"]): one["verdict"]["is"] for one in document["diffs"]}


def test_only_plans_that_changed_are_compiled_each_on_every_machine(
    repo: Callable[..., Path], compiler: Compiler, told: Told
) -> None:
    repo(
        {"meshes/a.toml": PLAN_8, "meshes/b.toml": PLAN_8, "other/c.toml": PLAN_8},
        {"meshes/a.toml": PLAN_16, "other/c.toml": PLAN_16},
    )
    found = told("v0..v1", "--", "meshes/", "--on", "cpu:2,h100:1x2")
    assert verdicts(found) == {("meshes/a.toml", "cpu:2"): "worse", ("meshes/a.toml", "h100:1x2"): "worse"}
    assert found["unchanged"] == ["meshes/b.toml"]
    assert sorted(set(compiler.compiled)) == [("a", "cpu:2"), ("a", "h100:1x2")]
    (row,) = found["diffs"][0]["changes"]
    # An all-reduce over two sends 2 · (2-1)/2 · 4 bytes an element.
    assert (row["base"]["wire_bytes"], row["head"]["wire_bytes"]) == ([32, 32], [64, 64])
    assert found["diffs"][0]["base"]["name"] == "v0:meshes/a.toml"
    assert found["base"].startswith("v0 (")


def test_added_deleted_and_untouched_plans_are_answers(
    repo: Callable[..., Path], compiler: Compiler, told: Told, capsys: pytest.CaptureFixture[str]
) -> None:
    repo(
        {"meshes/a.toml": PLAN_8, "meshes/gone.toml": PLAN_8},
        {"meshes/gone.toml": None, "meshes/new.toml": PLAN_16},
    )
    found = told("v0..v1")
    assert verdicts(found) == {
        ("meshes/gone.toml", "cpu:2"): "deleted",
        ("meshes/new.toml", "cpu:2"): "added",
    }
    assert found["unchanged"] == ["meshes/a.toml"]
    texts = [one["verdict"]["text"] for one in found["diffs"]]
    assert texts[0].startswith("Deleted: bytes sent 32 B; memory 8 kB")
    assert texts[1].startswith("Added: bytes sent 64 B; memory 16 kB")
    assert run("diff", "v1..v1") == 0
    assert "No plan changed: 2 untouched" in capsys.readouterr().out
    assert len(compiler.compiled) == 2


def test_what_a_plan_names_is_part_of_it(repo: Callable[..., Path], compiler: Compiler, told: Told) -> None:
    flags = PLAN_8 + '[compiler]\nflags = "flags.txt"\n'
    repo(
        {"meshes/base.toml": PLAN_8, "meshes/a.toml": 'extends = "base.toml"\n', "meshes/f.toml": flags,
         "meshes/flags.txt": "--xla_a=1\n"},
        {"meshes/base.toml": PLAN_16},
        {"meshes/flags.txt": "--xla_a=2\n"},
    )  # fmt: skip
    assert set(verdicts(told("v0..v1"))) == {("meshes/a.toml", "cpu:2"), ("meshes/base.toml", "cpu:2")}
    assert set(verdicts(told("v1..v2"))) == {("meshes/f.toml", "cpu:2")}


def test_a_machine_file_beside_the_plan_is_the_same_machine_in_both(
    repo: Callable[..., Path], compiler: Compiler, told: Told
) -> None:
    """Slower links: the same program takes longer, on a machine that is called the same in both trees."""
    machine = (DATA / "machines" / "dgx-h100.toml").read_text()
    assert '"nvlink4"' in machine
    plan = PLAN_8.replace("cpu:2", "mine.toml:1x2")
    repo(
        {"meshes/a.toml": plan, "meshes/mine.toml": machine},
        {"meshes/mine.toml": machine.replace('"nvlink4"', '"nvlink3"')},
    )
    found = told("v0..v1")
    assert verdicts(found) == {("meshes/a.toml", "meshes/mine.toml:1x2"): "worse"}
    (one,) = found["diffs"]
    assert one["totals"]["base"]["wire_bytes"] == one["totals"]["head"]["wire_bytes"]
    assert one["totals"]["base"]["time_s"] < one["totals"]["head"]["time_s"]
    assert [note for note in one["notes"] if note.startswith("machine")] == []


def test_the_working_tree_is_a_head_too(repo: Callable[..., Path], compiler: Compiler, told: Told) -> None:
    folder = repo({"meshes/a.toml": PLAN_8})
    (folder / "meshes" / "a.toml").write_text(PLAN_16)
    (folder / "meshes" / "draft.toml").write_text(PLAN_8)
    found = told("HEAD", "--", "meshes/")
    assert verdicts(found) == {("meshes/a.toml", "cpu:2"): "worse", ("meshes/draft.toml", "cpu:2"): "added"}
    assert found["head"] == "working tree"


def test_other_toml_files_are_no_plans_and_a_link_is_not_followed(
    repo: Callable[..., Path], compiler: Compiler, told: Told
) -> None:
    folder = repo({"pyproject.toml": "[project]\n", "a.toml": PLAN_8})
    (folder / "link.toml").symlink_to("a.toml")
    commit(folder, {"pyproject.toml": "[tool]\n", "a.toml": PLAN_16})
    found = told("v0..HEAD", "--", ".")
    assert verdicts(found) == {("a.toml", "cpu:2"): "worse"}
    assert found["notes"] == ["link.toml: a symbolic link, not followed"]


def test_limits_that_the_change_moved_are_said(
    repo: Callable[..., Path], compiler: Compiler, told: Told, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = repo({"meshes/a.toml": PLAN_8, "meshes/budgets.toml": '[a]\n"wire_bytes.fsdp" = "10 GB"\n'})
    assert run("check", "meshes/a.toml", "--update") == 0
    commit(folder, {})
    commit(folder, {"meshes/a.toml": PLAN_16, "meshes/budgets.toml": '[a]\n"wire_bytes.fsdp" = "12 GB"\n'})
    assert run("check", "meshes/a.toml", "--update") == 0
    commit(folder, {})
    capsys.readouterr()
    found = told("v0..HEAD")
    assert found["limits"] == ["budget for wire_bytes.fsdp of a raised from 10 GB to 12 GB in this change"]
    assert told("HEAD~2..HEAD")["limits"][1] == (
        "baseline of a raised in this change: wire_bytes.total from 32 B to 64 B, wire_bytes.fsdp from 32 B "
        "to 64 B, traffic.loopback from 32 B to 64 B, memory.peak from 8 kB to 16 kB"
    )
    assert run("diff", "v0..HEAD", "--markdown") == 0
    assert "- budget for wire\\_bytes.fsdp of a raised from 10 GB to 12 GB" in capsys.readouterr().out


def test_check_says_which_limits_moved_since_a_revision(
    repo: Callable[..., Path], compiler: Compiler, capsys: pytest.CaptureFixture[str]
) -> None:
    budgets = "meshes/budgets.toml"
    folder = repo({"meshes/a.toml": PLAN_8, budgets: '[a]\n"memory.peak" = "10 GB"\n'})
    assert run("check", "--update") == 0
    commit(folder, {})
    (folder / budgets).write_text('[a]\n"memory.peak" = "12 GB"\n')
    (folder / "meshes" / "a.toml").write_text(PLAN_16)
    capsys.readouterr()
    assert run("check", "--since", "HEAD", "--update", "--json") == 0
    raised, written_again = json.loads(capsys.readouterr().out)["limits"]
    assert raised == "budget for memory.peak of a raised from 10 GB to 12 GB in this change"
    assert written_again.startswith("baseline of a raised in this change: wire_bytes.total from 32 B to 64 B")
    assert run("check", "--since", "HEAD") == 0
    assert "note budget for memory.peak of a raised from 10 GB to 12 GB" in capsys.readouterr().out
    compiler.compiled.clear()
    (said,) = mistakes(capsys, "check", "--since", "nope")
    assert "nope: is no revision that git knows here" in said
    assert compiler.compiled == []


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (("v0..v1", "--", "nowhere"), "nowhere: is neither in v0 nor v1; name a folder"),
        (("v0..v1", "--", "docs"), "docs: no mesh file in v0 or v1; name where they are"),
        (("v0..v1", "--on", "h100:8x8"), "--on: meshes/a.toml: 2 devices, not put on h100:8x8, which has 64"),
        (("v0..v1", "--on", "h100:x"), "is not HOSTSxCHIPS"),
        (("v0..v1", "--model", "nope"), "unknown model"),
        (("--", "meshes"), "arguments are required: BASE"),
        (("meshes/a.toml",), "meshes/a.toml: is a file, and no revision; name the other file too"),
        (("v0", "v1", "--on", "cpu:2,cpu:2"), "--on: two files are compared on one machine"),
    ],
    ids=["nowhere", "no plans", "no machine fits", "machine", "model", "no base", "one file", "two machines"],
)
def test_mistakes_are_one_line_that_says_what_next(
    argv: tuple[str, ...],
    line: str,
    repo: Callable[..., Path],
    compiler: Compiler,
    capsys: pytest.CaptureFixture[str],
) -> None:
    repo({"meshes/a.toml": PLAN_8, "docs/x.md": ""}, {"meshes/a.toml": PLAN_16})
    (said,) = mistakes(capsys, "diff", *argv)
    assert line in said
    assert compiler.compiled == []


def test_a_machine_that_some_plans_do_not_fill_is_noted(
    repo: Callable[..., Path], compiler: Compiler, told: Told
) -> None:
    repo(
        {"meshes/a.toml": PLAN_8, "meshes/b.toml": FOUR},
        {"meshes/a.toml": PLAN_16, "meshes/b.toml": FOUR + "\n"},
    )
    found = told("v0..v1", "--on", "cpu:2")
    assert set(verdicts(found)) == {("meshes/a.toml", "cpu:2")}
    assert found["notes"] == ["meshes/b.toml: 4 devices, not put on cpu:2, which has 2"]


BROKEN = PLAN_8.replace('embed = ["fsdp"]', 'embed = ["fsdb"]')


def test_mistakes_of_the_head_are_the_changes_and_those_of_the_base_an_answer(
    repo: Callable[..., Path], compiler: Compiler, told: Told, capsys: pytest.CaptureFixture[str]
) -> None:
    repo(
        {"meshes/a.toml": PLAN_8, "meshes/b.toml": PLAN_8},
        {"meshes/a.toml": BROKEN, "meshes/b.toml": PLAN_16},
    )
    (said,) = mistakes_after_progress(capsys, "diff", "v0..v1")
    assert said.startswith("v1:meshes/a.toml:6: params.embed: ")
    back, _ = told("v1..v0")["diffs"]
    assert back["verdict"]["is"] == "better"
    assert "the base could not run (mistakes: v1:meshes/a.toml:6" in back["verdict"]["text"]


def mistakes_after_progress(capsys: pytest.CaptureFixture[str], *argv: str) -> list[str]:
    assert run(*argv) == 2
    return [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[")]


def test_what_neither_can_do_is_an_answer_beside_others_and_a_mistake_alone(
    repo: Callable[..., Path], compiler: Compiler, told: Told, capsys: pytest.CaptureFixture[str]
) -> None:
    breaks = PLAN_8.replace("FSDP over two emulated devices", "breaks the compiler")
    repo(
        {"meshes/a.toml": PLAN_8, "meshes/b.toml": breaks},
        {"meshes/a.toml": PLAN_16, "meshes/b.toml": breaks + "\n"},
    )
    found = told("v0..v1")
    assert verdicts(found)["meshes/b.toml", ""] == "unknown"
    assert "the compiler crashed" in found["diffs"][1]["verdict"]["text"]
    (said,) = mistakes_after_progress(capsys, "diff", "v0..v1", "--", "meshes/b.toml")
    assert "the compiler crashed" in said


def test_a_training_step_that_sends_nothing_any_more_is_worse_or_cannot_be(
    repo: Callable[..., Path], compiler: Compiler, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo({"meshes/a.toml": PLAN_8}, {"meshes/a.toml": PLAN_16})
    compile_case = compiler.compile
    silent = HLO.replace("all-reduce(p)", "negate(p)").split(", channel_id")[0] + "\n}\n"

    def compiled(case: Case) -> Program:
        made = compile_case(case)
        return replace(made, hlo_text=silent) if case.seq == 16 else made

    monkeypatch.setattr(compiler, "compile", compiled)
    (one,) = told("v0..v1")["diffs"]
    assert one["verdict"]["is"] == "worse"
    assert "no collective was found in a training step on 2 devices" in one["verdict"]["text"]


def test_each_revision_has_its_own_step_function(
    repo: Callable[..., Path], compiler: Compiler, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No plan changes: the user's package does, and is taken from each tree, also below its root."""
    own = PLAN + '[check]\nstep = "mystep:make"\n'
    folder = repo(
        {"src/mystep.py": "n = 08\n", "src/a.toml": own, "src/b.toml": PLAN_8}, {"src/mystep.py": "n = 16\n"}
    )
    monkeypatch.chdir(folder / "src")
    found = told("v0..v1", "--", ".")
    assert verdicts(found) == {("src/a.toml", "cpu:2"): "worse"}
    (row,) = found["diffs"][0]["changes"]
    assert (row["base"]["wire_bytes"], row["head"]["wire_bytes"]) == ([32, 32], [64, 64])
    commit(folder, {"src/mystep.py": None})
    (back,) = told("HEAD..v1", "--", "a.toml")["diffs"]
    assert "no module 'mystep'" in back["verdict"]["text"]
    assert told("v0..v1", "--", "b.toml", "--step", "mystep:make")["diffs"][0]["verdict"]["is"] == "worse"


# A shardlab of another time: all that is relied on is its `explain`.
CLI = """\
import json, pathlib, sys
def main():
    plan, saved = sys.argv[2], sys.argv[sys.argv.index("--save") + 1]
    if "broken" in plan:
        print(f"{plan}:3: nonsense", file=sys.stderr)
        return 2
    pathlib.Path(saved).write_bytes(bytes.fromhex(pathlib.Path("shardlab/compile/program").read_text()))
    case = {"plan": plan, "machine": "cpu:2", "model": "tiny", "batch": 2, "seq": 8, "workload": "train"}
    print(json.dumps({"schema": "shardlab.report/1", "case": case, "notes": ["of the tree"]}))
    return 0
"""


def sources(elements: int, cli: str = CLI) -> dict[str, str]:
    """A repository that is shardlab; its program reduces so many f32."""
    program = Program(
        name="step", backend="cpu", hlo_text=HLO.replace("f32[4]", f"f32[{elements}]"), num_devices=2,
        mesh={"data": 2},
    )  # fmt: skip
    code = {"shardlab/__init__.py": "", "shardlab/cli.py": cli, "shardlab/compile/child.py": ""}
    return code | {
        "shardlab/compile/program": to_bytes(program).hex(),
        "shardlab/model/step.py": f"elements = {elements}\n",
    }


def test_revisions_of_shardlab_build_their_programs_with_their_own_sources(
    repo: Callable[..., Path], compiler: Compiler, told: Told, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "model" in BUILDERS
    plans = {"meshes/a.toml": PLAN_8, "meshes/b.toml": PLAN_8}
    folder = repo({**sources(4), **plans}, sources(8))
    found = told("v0..v1")
    assert verdicts(found) == {("meshes/a.toml", "cpu:2"): "worse", ("meshes/b.toml", "cpu:2"): "worse"}
    (row,) = found["diffs"][0]["changes"]
    assert (row["base"]["wire_bytes"], row["head"]["wire_bytes"]) == ([16, 16], [32, 32])
    assert compiler.compiled == []
    commit(folder, {"README.md": "", "meshes/broken.toml": PLAN_8})
    assert told("v1..v1")["diffs"] == []
    (said,) = mistakes_after_progress(capsys, "diff", "v1..HEAD")
    assert said == "HEAD:meshes/broken.toml:3: nonsense"


@pytest.mark.matrix
def test_two_real_compiles(repo: Callable[..., Path], told: Told) -> None:
    """Nothing replaced: twice the sequence is twice the FLOPs of matrix products and a little attention."""
    prefill = CHECK + 'workload = "prefill"\n'
    repo({"a.toml": PLAN + prefill}, {"a.toml": (PLAN + prefill).replace("seq = 8", "seq = 16")})
    found = told("v0..v1", "--", "a.toml", "--no-cache")
    (one,) = found["diffs"]
    assert one["verdict"]["is"] == "worse"
    assert found["programs"]["compiled"] == 2
    ratio = one["head"]["flops"] / one["base"]["flops"]
    assert 2 <= ratio < 2.2
