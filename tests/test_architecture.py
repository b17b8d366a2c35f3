"""The house as DESIGN drew it: imports go one way, jax stays behind its wall, functions stay short."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "shardlab"

# Top to bottom: a module imports only what stands above it (or beside it, in its own package).
ORDER = (
    "errors", "units", "text", "hardware", "spec", "program", "recording", "record", "store", "model",
    "parallel", "compile", "hlo", "attribute", "cost", "analysis", "order", "audit", "why", "prediction",
    "straggler", "case_report", "case_document", "agreement", "capacity", "compare", "review", "report",
    "lab", "testing", "pytest_plugin", "arguments", "completion", "output", "cli", "__main__",
)  # fmt: skip
WITHOUT_JAX = (
    "hardware", "spec", "program", "recording", "record", "store", "hlo", "attribute", "cost", "analysis",
    "order", "audit", "why", "prediction", "straggler", "case_report", "case_document", "agreement",
    "capacity", "compare", "review", "report",
)  # fmt: skip
WITHOUT_PYDANTIC = ("hlo", "attribute", "cost", "analysis", "order", "audit", "hardware")
# `__init__` re-exports the Python interface, lazily; any module may read it for the version alone.
PUBLIC = "__init__"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 400


def part_of(path: Path) -> str:
    """The top-level member of the package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """(module, whether it runs at import time) of each import; those under TYPE_CHECKING do not count."""
    for node, deferred in nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, not deferred) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the direction"
            yield from ((f"{node.module}.{alias.name}", not deferred) for alias in node.names)


def nodes(tree: ast.AST) -> Iterator[tuple[ast.AST, bool]]:
    """Every node, and whether it is inside a function; what is under `if TYPE_CHECKING` is left out."""
    stack = [(tree, False)]
    while stack:
        node, deferred = stack.pop()
        yield node, deferred
        inside = deferred or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        type_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        children = node.orelse if type_only else ast.iter_child_nodes(node)  # type: ignore[attr-defined]
        stack += [(child, inside) for child in children]


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name, _ in imports(parsed(path))}


def of_parts(parts: tuple[str, ...]) -> list[Path]:
    return [path for path in FILES if part_of(path) in parts]


def test_every_member_of_the_package_has_its_place() -> None:
    members = {part_of(path) for path in FILES} - {PUBLIC}
    assert members <= set(ORDER), f"not placed in ORDER: {sorted(members - set(ORDER))}"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_one_way(path: Path) -> None:
    part = part_of(path)
    if part == PUBLIC:
        return
    mine = ORDER.index(part)
    for name, _ in imports(parsed(path)):
        if name.startswith("shardlab."):
            other = name.split(".")[1]
            assert other in ORDER, f"{name} is no member of the package"
            assert ORDER.index(other) <= mine, f"{part} imports {other}, which stands below it"


def test_no_cycles_between_modules() -> None:
    known = {module_name(path): path for path in FILES}
    graph: dict[str, set[str]] = {}
    for name, path in known.items():
        found = {target for target, at_import in imports(parsed(path)) if at_import}
        # `from package.module import name`: the module is the longest prefix that is one.
        graph[name] = {prefix for target in found if (prefix := longest(target, known)) and prefix != name}
    assert cycle(graph) == []


def longest(target: str, known: dict[str, Path]) -> str:
    parts = target.split(".")
    prefixes = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in known), "")


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """The modules left when those that import nothing (left) have been taken away, again and again."""
    left = {name: set(targets) for name, targets in graph.items()}
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)


def test_a_cycle_would_be_found() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]


@pytest.mark.parametrize("path", of_parts(WITHOUT_JAX), ids=module_name)
def test_jax_stays_behind_its_wall(path: Path) -> None:
    assert not roots(path) & {"jax", "jaxlib", "flax", "optax", "chex", "numpy", "libtpu"}


@pytest.mark.parametrize("path", of_parts(WITHOUT_PYDANTIC), ids=module_name)
def test_reading_and_costing_need_no_dependency(path: Path) -> None:
    assert not roots(path) & {"pydantic", "rich", "jinja2"}


def test_only_the_html_writer_needs_the_report_extra() -> None:
    """And it imports its packages when it writes, so that reports to a terminal do without."""
    extra = {"jinja2", "markupsafe", "vl_convert"}
    users = {module_name(path) for path in FILES if roots(path) & extra}
    assert users == {"shardlab.report.html.draw", "shardlab.report.html.write"}
    for path in FILES:
        assert not {name.split(".")[0] for name, at_import in imports(parsed(path)) if at_import} & extra


def test_errors_and_units_import_nothing_of_the_package() -> None:
    for path in of_parts(("errors", "units")):
        assert "shardlab" not in roots(path)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_and_functions_stay_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{node.name} has {lines} lines"


HLO = """\
HloModule m, num_partitions=2

add { a = f32[] parameter(0)
  b = f32[] parameter(1)
  ROOT c = f32[] add(a, b) }

ENTRY main { p = f32[4]{0} parameter(0)
  ROOT r = f32[4]{0} all-reduce(p), channel_id=1,
    replica_groups={{0,1}}, use_global_device_ids=true, to_apply=add }
"""
PROBE = """\
import sys, json
from shardlab.cli import main
code = main(["analyze", "-", "--axes", "data=2", "--on", "h100:1x2", "--json"])
heavy = {"jax", "jaxlib", "flax", "numpy", "rich", "pydantic", "jinja2", "vl_convert"}
print(json.dumps([code, sorted(heavy & set(sys.modules))]), file=sys.stderr)
"""


def test_analyze_json_needs_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        input=HLO,
        capture_output=True,
        text=True,
        cwd=PACKAGE.parent,
        check=False,
    )
    assert json.loads(done.stderr) == [0, []]
    assert json.loads(done.stdout)["collectives"][0]["wire_bytes"] == 16  # 2 · (2-1)/2 · 4 · 4 bytes
