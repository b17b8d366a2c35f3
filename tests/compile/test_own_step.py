"""The user's own step function: what it is given, what it may return, and what its mistakes say."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from own_steps import HEAD, SUM, compiled, mesh_plan, write_step

from shardlab.analysis import analyze
from shardlab.compile.key import program_key
from shardlab.compile.step_sources import sources_digest, step_sources
from shardlab.errors import UserError
from shardlab.program import from_bytes, to_bytes
from shardlab.spec.step import make_step_case

ALL_REDUCE_BYTES = 7  # 2 · 7/8 of one f32


@pytest.fixture(autouse=True)
def imports_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A child imports one step; here many are called `mine`."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in ("mine", "pkg", "beside")]:
        del sys.modules[name]


def test_one_program_is_a_function_with_its_arguments(tmp_path: Path) -> None:
    program = compiled(write_step(tmp_path, SUM), tmp_path)
    assert (program.name, program.runs_per_step, program.then, program.notes) == ("total", 1, (), ())
    assert program.mesh == {"x": 8}
    assert analyze(program).totals.wire_bytes == (ALL_REDUCE_BYTES, ALL_REDUCE_BYTES)


SEVERAL = """\
def make_step(mesh):
    arguments = (struct(mesh, 16, over="x"),)
    return {forms}
"""


@pytest.mark.parametrize(
    "forms",
    [
        '{"many": (jax.jit(total), arguments, 16), "one": (jax.jit(total), arguments)}',
        '[StepProgram("many", jax.jit(total), arguments, 16), StepProgram("one", jax.jit(total), arguments)]',
        '{"many": StepProgram("", jax.jit(total), arguments, 16), "one": (jax.jit(total), arguments, 1)}',
    ],
    ids=["dict", "records", "mixed"],
)
def test_several_programs_count_as_often_as_they_run(tmp_path: Path, forms: str) -> None:
    body = "from shardlab import StepProgram\n" + SEVERAL.format(forms=forms)
    program = compiled(write_step(tmp_path, body), tmp_path)
    program = from_bytes(to_bytes(program))
    assert [(one.name, one.runs_per_step) for one in program.programs] == [("many", 16), ("one", 1)]
    analysis = analyze(program)
    assert analysis.totals.wire_bytes == (17 * ALL_REDUCE_BYTES, 17 * ALL_REDUCE_BYTES)
    assert analysis.totals.by_axes["x"]["wire_bytes"][0] == 17 * ALL_REDUCE_BYTES
    assert [row.executions for row in analysis.collectives] == [(16, 16), (1, 1)]
    assert [row.wire_bytes for row in analysis.collectives] == [ALL_REDUCE_BYTES] * 2
    assert [facts.get("runs_per_step") for facts in analysis.to_json()["modules"]] == [16, None]
    assert type(analysis).from_json(analysis.to_json()) == analysis


def test_it_is_given_what_it_asks_for(tmp_path: Path) -> None:
    body = """\
def make_step(mesh, plan, batch, workload, seq=4, **others):
    assert (plan.params, workload, others) == ({"embed": ("x",)}, "prefill", {})
    return jax.jit(total), (struct(mesh, batch, seq, over="x"),)
"""
    plan = mesh_plan(params={"embed": ("x",)})
    program = compiled(write_step(tmp_path, body), tmp_path, plan, batch=16, workload="prefill", model="big")
    assert program.given == {"batch": 16, "workload": "prefill"}
    assert program.notes == ("model big: not used, mine:make_step does not ask for it",)
    assert program.arguments is not None
    assert program.arguments[0].shape == (16, 4)


def test_what_is_not_used_is_said(tmp_path: Path) -> None:
    body = SUM
    plan = mesh_plan({"x": 4, "y": 2}, params={"embed": ("x",)}, optimizer={"embed": ("x",)})
    assert compiled(write_step(tmp_path, body), tmp_path, plan, batch=8).notes == (
        "[params] of the plan are not used: mine:make_step does not ask for plan",
        "batch 8: not used, mine:make_step does not ask for it",
        "nothing is split over y 2: its devices repeat each other's work",
    )


def test_one_program_of_a_step_may_be_the_same_everywhere(tmp_path: Path) -> None:
    """As an update of parameters that every device holds."""
    body = """\
def make_step(mesh):
    split, whole = (struct(mesh, 16, over="x"),), (struct(mesh, 16),)
    return {"sum": (jax.jit(total), split), "update": (jax.jit(jnp.cumsum), whole)}
"""
    program = compiled(write_step(tmp_path, body), tmp_path)
    assert [one.name for one in program.programs] == ["sum", "update"]
    assert program.notes == ()


def test_an_axis_that_only_a_constraint_uses_is_used(tmp_path: Path) -> None:
    body = """\
def make_step(mesh):
    split = NamedSharding(mesh, P("y"))
    step = lambda x: jnp.sum(jax.lax.with_sharding_constraint(x, split))
    return jax.jit(step), (struct(mesh, 16, over="x"),)
"""
    assert compiled(write_step(tmp_path, body), tmp_path, mesh_plan({"x": 4, "y": 2})).notes == ()


# body -> what the one mistake says
MISTAKES: dict[str, tuple[str, str]] = {
    "no such function": (
        "def make_steps(mesh): ...",
        "mine:make_step: mine has no function 'make_step'; it has make_steps",
    ),
    "an error while it is imported": (
        "import no_such_package_of_theirs",
        "mine.py:10 (<module>): ModuleNotFoundError: No module named 'no_such_package_of_theirs'",
    ),
    "it exits": ("raise SystemExit(3)", "mine.py:10 (<module>): SystemExit: 3"),
    "an error in it": (
        "def helper():\n    raise KeyError('no\\nsuch key')\ndef make_step(mesh):\n    helper()",
        "mine.py:11 (helper): KeyError: 'no\\nsuch key'",
    ),
    "an error while it is traced": (
        "def step(x):\n    return x @ jnp.ones((3, 3))\n"
        "def make_step(mesh):\n    return jax.jit(step), (struct(mesh, 8, 8, over='x'),)",
        "mine.py:11 (step): TypeError: dot_general requires contracting dimensions to have the same shape",
    ),
    "not jitted": (
        "def make_step(mesh):\n    return total, (struct(mesh, 8, over='x'),)",
        "mine:make_step: total is not jitted; return what jax.jit(…) made",
    ),
    "data": (
        "def make_step(mesh):\n    return jax.jit(total), ({'w': jnp.ones((8, 2))},)",
        "mine:make_step: total: args[0]['w'] is an array of float32[8,2]; give jax.ShapeDtypeStruct",
    ),
    "no mesh": (
        "def make_step(mesh):\n    return jax.jit(total), (jax.ShapeDtypeStruct((8,), jnp.float32),)",
        "mine:make_step: total runs on 1 of 8 devices; put NamedSharding(mesh, …) on its arguments",
    ),
    "a mesh that nothing is split over": (
        "def make_step(mesh):\n    return jax.jit(total), (struct(mesh, 8),)",
        "mine:make_step: nothing in it is split over the mesh, x 8; put NamedSharding",
    ),
    "another mesh": (
        "from jax.sharding import Mesh\ndef make_step(mesh):\n"
        "    return jax.jit(total), (struct(Mesh(mesh.devices[::-1], 'x'), 8, over='x'),)",
        "mine:make_step: total uses a mesh whose devices are in another order",
    ),
    "half of the mesh": (
        "from jax.sharding import Mesh\ndef make_step(mesh):\n"
        "    return jax.jit(total), (struct(Mesh(mesh.devices[:4], 'x'), 8, over='x'),)",
        "mine:make_step: total runs on 4 of 8 devices; use the whole mesh",
    ),
    "what nobody gave": (
        "def make_step(mesh, seq): ...",
        "mine:make_step: it asks for seq, which nobody gave; give --seq, or a default",
    ),
    "what nobody knows": (
        "def make_step(mesh, cfg): ...",
        "mine:make_step: it asks for 'cfg', which shardlab does not know; ask for mesh, plan, batch",
    ),
    "nothing": (
        "def make_step(mesh): ...",
        "mine:make_step: it returned NoneType; return (jitted, arguments)",
    ),
    "no program": (
        "def make_step(mesh):\n    return []",
        "mine:make_step: it returned an empty list; return (jitted, arguments)",
    ),
    "arguments side by side": (
        "def make_step(mesh):\n    return jax.jit(total), struct(mesh, 8), struct(mesh, 8), 1",
        "mine:make_step: it returned a tuple of 4; return (jitted, arguments)",
    ),
    "no number of runs": (
        "def make_step(mesh):\n    return jax.jit(total), (struct(mesh, 8),), 0",
        "mine:make_step: runs_per_step of total is 0, not a whole number above 0",
    ),
    "one name twice": (
        "from shardlab import StepProgram\n"
        "def make_step(mesh):\n    return [StepProgram('a', jax.jit(total), ()) for _ in range(2)]",
        "mine:make_step: two programs of one name: a, a; name them apart",
    ),
}


@pytest.mark.parametrize(("body", "says"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_that_points_to_it(tmp_path: Path, body: str, says: str) -> None:
    step = write_step(tmp_path, body)
    with pytest.raises(UserError) as caught:
        compiled(step, tmp_path)
    assert len(caught.value.problems) == 1
    assert str(caught.value).startswith(says)


def test_a_size_that_does_not_divide(tmp_path: Path) -> None:
    """In the words of whichever JAX."""
    body = "def make_step(mesh):\n    return jax.jit(total), (struct(mesh, 12, over='x'),)"
    with pytest.raises(UserError, match=r"^mine:make_step: \w*Error: .*\b12\b.* divi") as caught:
        compiled(write_step(tmp_path, body), tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_a_module_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pkg\.step:make_step: no module 'pkg' in .* set PYTHONPATH"):
        compiled("pkg.step:make_step", tmp_path)


def test_arrays_are_listed_but_not_all(tmp_path: Path) -> None:
    body = "def make_step(mesh):\n    return jax.jit(total), ([jnp.ones(2)] * 5,)"
    with pytest.raises(UserError) as caught:
        compiled(write_step(tmp_path, body), tmp_path)
    assert [problem.what for problem in caught.value.problems][2:] == [
        "total: args[0][2] is an array of float32[2]",
        "total: 2 more arrays",
    ]


def package(folder: Path) -> dict[str, str]:
    files: dict[str, Any] = {
        "pkg/__init__.py": "",
        "pkg/step.py": "import jax\nfrom beside import layers\nfrom . import inner\n",
        "pkg/inner.py": "def f():\n    import beside2\n",
        "beside/__init__.py": "",
        "beside/layers.py": "x = (\n",  # a mistake in it is not ours
        "beside2.py": "",
        "pkg/config/large.yaml": "layers: 4\n",
        "unrelated.py": "import pkg",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(text)
    return files


def test_the_sources_of_a_step_are_its_package_and_what_lies_beside_it(tmp_path: Path) -> None:
    files = package(tmp_path)
    for name in ("pkg/.hidden", "pkg/__pycache__/step.pyc", "pkg/weights.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * (1 << 20) + b"x")
    found = step_sources("pkg.step:make_step", tmp_path)
    assert {path.relative_to(tmp_path).as_posix() for path in found} == files.keys() - {"unrelated.py"}


@pytest.mark.parametrize(
    ("name", "changes"),
    [("pkg/inner.py", True), ("beside2.py", True), ("pkg/config/large.yaml", True), ("unrelated.py", False)],
)
def test_the_digest_changes_with_them(tmp_path: Path, name: str, changes: bool) -> None:
    package(tmp_path)
    before = sources_digest("pkg.step:make_step", tmp_path)
    (tmp_path / name).write_text("def f():\n    import beside2\n# a comment\n")
    assert (sources_digest("pkg.step:make_step", tmp_path) != before) == changes


def test_the_same_sources_elsewhere_are_the_same(tmp_path: Path) -> None:
    digests = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        package(tmp_path / name)
        digests.append(sources_digest("pkg.step:make_step", tmp_path / name))
    assert digests[0] == digests[1]


def test_what_is_cached_dies_with_the_sources_and_what_the_step_was_given(tmp_path: Path) -> None:
    package(tmp_path)

    def key(**given: Any) -> str:
        return program_key(make_step_case(mesh_plan(), "pkg.step:make_step", folder=tmp_path, **given))

    first = key(batch=8)
    assert key(batch=8) == first
    assert len({first, key(batch=9), key(batch=8, model="large"), key(batch=8, workload="decode")}) == 4
    (tmp_path / "pkg" / "config" / "large.yaml").write_text("layers: 5\n")
    assert key(batch=8) != first


def test_sources_of_no_package(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no module 'nowhere_at_all'"):
        step_sources("nowhere_at_all:make_step", tmp_path)


def test_the_head_has_as_many_lines_as_the_mistakes_say() -> None:
    assert len(HEAD.splitlines()) == 9
