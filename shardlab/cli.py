"""The command line: verbs over the rest. Reads flags, calls one function per verb, prints what it returns.

Exit codes: 0 ran; 1 ran, and `--strict` found something that was not counted; 2 could not run, with one line
per mistake on standard error. What a verb needs is imported by that verb: `analyze --json` starts without
jax, rich and pydantic.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from shardlab.errors import Problem, ShardlabError, UserError

if TYPE_CHECKING:
    from shardlab.analysis import Analysis
    from shardlab.audit import Finding
    from shardlab.lab.cases import Question
    from shardlab.order import Orders
    from shardlab.program import Program
    from shardlab.report.page import Page

INTERRUPTED = 130

EXAMPLES = """\
examples:
  shardlab compare meshes/cpu8-*.toml --model gpt2-124m
  shardlab explain meshes/h100x512-fsdp64-tensor8.toml --model llama3-70b
  shardlab analyze dump/ --axes data=4,model=2 --on h100:1x8 --json
  shardlab doctor
"""
ANALYZE_EXAMPLES = """\
PATH is compiled HLO: text, proto, gzip or zstd of either, an xla_dump_to folder,
a saved program, or - for standard input.

examples:
  shardlab analyze dump/ --axes data=4,model=2
  shardlab analyze step.program --on h100:64x8 --json
  shardlab analyze step.program --on h100:64x8 --order
  shardlab analyze step.program --audit
  XLA_FLAGS=--xla_dump_to=dump python train.py; shardlab analyze dump --mesh plan.toml --strict
"""
EXPLAIN_EXAMPLES = """\
examples:
  shardlab explain meshes/cpu8-fsdp.toml --model gpt2-124m
  shardlab explain plan.toml --model llama3-70b --on v5p:8x8x8 --save step.program
"""
COMPARE_EXAMPLES = """\
examples:
  shardlab compare meshes/cpu8-*.toml --model gpt2-124m
  shardlab compare plan.toml --model llama3-70b --on cpu:512,h100:64x8,v5p:8x8x8
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code and never raises for a mistake of the user's."""
    _never_fail_to_print()
    try:
        args = parser().parse_args(argv)
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except ShardlabError as error:
        print(_one_line_each(error), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has gone. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _never_fail_to_print() -> None:
    """A name that standard output's encoding lacks is written as `\\u2013`, not answered with a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


class _Parser(argparse.ArgumentParser):
    """argparse whose mistakes are one line on standard error, exit code 2."""

    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"{self.prog}: {message}; see {self.prog} --help\n")
        raise SystemExit(2)


def parser() -> argparse.ArgumentParser:
    """Every verb and flag; what is not built is not here."""
    top = _Parser(
        prog="shardlab",
        description="What a sharding plan costs, read from the compiled program.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_analyze(_verb(verbs, "analyze", "what a compiled program communicates", ANALYZE_EXAMPLES))
    _add_explain(_verb(verbs, "explain", "compile one plan and break down what it costs", EXPLAIN_EXAMPLES))
    _add_compare(_verb(verbs, "compare", "compile several plans and rank them", COMPARE_EXAMPLES))
    doctor = _verb(verbs, "doctor", "which targets this machine can compile for", "")
    doctor.add_argument("--deep", action="store_true", help="prove each target with a tiny compile")
    doctor.add_argument("--json", action="store_true", help="print one JSON document")
    doctor.set_defaults(run=run_doctor)
    return top


def _verb(
    verbs: argparse._SubParsersAction[_Parser], name: str, summary: str, examples: str
) -> argparse.ArgumentParser:
    return verbs.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _add_analyze(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("paths", nargs="+", metavar="PATH", help="HLO dump, dump folder, saved program, or -")
    mesh = verb.add_mutually_exclusive_group()
    mesh.add_argument("--axes", metavar="A=N,B=M", help="mesh axes, major to minor")
    mesh.add_argument("--mesh", metavar="FILE", help="take the axes from this mesh file")
    verb.add_argument(
        "--device-ids", metavar="0,1,…", help="the device at each position of the mesh, row-major"
    )
    verb.add_argument("--on", metavar="MACHINE", help="price the traffic on this machine, such as h100:64x8")
    _add_order(verb)
    verb.add_argument("--audit", action="store_true", help="list what could be saved, and how")
    verb.add_argument("--strict", action="store_true", help="exit 1 when something was not counted exactly")
    _add_format(verb)
    verb.set_defaults(run=run_analyze)


def _add_explain(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("mesh", metavar="MESH", help="mesh file (TOML)")
    verb.add_argument(
        "--on", metavar="MACHINE", help="the plan's own machine unless said: cpu:8, h100:64x8, v5p:8x8x8"
    )
    _add_workload(verb)
    _add_order(verb)
    _add_format(verb)
    verb.add_argument("--hlo", metavar="FILE", help="write the compiled HLO text")
    verb.add_argument("--save", metavar="FILE", help="write the whole program, for analyze")
    verb.set_defaults(run=run_explain)


def _add_compare(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("meshes", nargs="+", metavar="MESH", help="mesh files (TOML)")
    verb.add_argument("--on", metavar="M1,M2,…", help="machines; each plan's own unless said")
    _add_workload(verb)
    verb.add_argument(
        "--jobs", type=_positive, metavar="N", help="compiles at a time (default: by cores and memory)"
    )
    _add_format(verb)
    verb.set_defaults(run=run_compare)


def _add_workload(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--model", metavar="NAME", help="such as gpt2-124m, llama3-70b (default: the plan's [check])"
    )
    verb.add_argument("--batch", type=_positive, metavar="N", help="global batch in sequences")
    verb.add_argument("--seq", type=_positive, metavar="N", help="tokens per sequence")
    verb.add_argument(
        "--workload", choices=("train", "prefill", "decode"), default="train", help="default: train"
    )


def _add_order(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--order", action="store_true", help="price other device orders of the same program")


def _add_format(verb: argparse.ArgumentParser) -> None:
    formats = verb.add_mutually_exclusive_group()
    formats.add_argument("--json", action="store_true", help="print one JSON document")
    formats.add_argument("--markdown", action="store_true", help="print Markdown")


def _positive(text: str) -> int:
    if not _is_count(text):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number above 0")
    return int(text)


def _print_analysis(
    args: argparse.Namespace,
    analysis: Analysis,
    findings: Sequence[Finding] | None,
    orders: Orders | None,
) -> None:
    """What was asked for beside the analysis goes with it; what was not is not even imported."""
    if args.json:
        document = analysis.to_json()
        if findings is not None:
            from shardlab.audit import finding_json

            document |= {"audit": [finding_json(one) for one in findings]}
        if orders is not None:
            from shardlab.order import orders_member

            document |= orders_member(orders)
        _print_json(document)
        return
    from shardlab.report.explain import analysis_page

    page = analysis_page(analysis, findings=findings)
    if orders is not None:
        from shardlab.report.order import with_orders

        page = with_orders(page, orders)
    _print_page(page, args.markdown)


def run_analyze(args: argparse.Namespace) -> int:
    """`shardlab analyze`: exit 1 only with --strict and a ledger that is not empty."""
    from shardlab.analysis import attribute, merge

    machine = None
    if args.on:
        from shardlab.hardware.catalog import load_machine

        machine = load_machine(args.on)
    axes = _axes_of_mesh(args.mesh) if args.mesh else parse_axes(args.axes)
    parts = attribute(args.paths, axes, parse_device_ids(args.device_ids), machine)
    kept = tuple(parts) if args.order or args.audit else ()
    orders = findings = None
    if args.order:
        from shardlab.order import best_orders

        orders = best_orders(kept, machine)
    if args.audit:
        from shardlab.audit import audit_parts

        findings = audit_parts(kept)
    analysis = merge([part.analysis for part in kept or parts])
    _print_analysis(args, analysis, findings, orders)
    return 1 if args.strict and analysis.ledger else 0


def run_explain(args: argparse.Namespace) -> int:
    """`shardlab explain`: one case. Infeasible or too large is an answer; not compiled is exit 2."""
    from shardlab.case_report import to_json
    from shardlab.lab.study import explain_plan, orders_of
    from shardlab.order import orders_member

    for path in filter(None, (args.hlo, args.save)):
        _check_writable(path)
    machines = (args.on,) if args.on else ()
    report = explain_plan(args.mesh, _question(args, machines), progress=sys.stderr)
    _write_program(report.program, args.hlo, args.save)
    orders = orders_of(report) if args.order else None
    if args.json:
        _print_json(to_json(report, instructions=True) | orders_member(orders))
    else:
        from shardlab.report.explain import explain_page
        from shardlab.report.order import with_orders

        _print_page(with_orders(explain_page(report), orders), args.markdown)
    return 0


def run_compare(args: argparse.Namespace) -> int:
    """`shardlab compare`: every plan on every machine, one batch for all."""
    from shardlab.compare import comparison_json
    from shardlab.lab.study import compare_plans

    machines = tuple(name.strip() for name in args.on.split(",")) if args.on else ()
    comparison = compare_plans(args.meshes, _question(args, machines), progress=sys.stderr, jobs=args.jobs)
    if args.json:
        _print_json(comparison_json(comparison))
    else:
        from shardlab.report.comparison import WIDE_COLUMNS, comparison_page

        width = WIDE_COLUMNS if args.markdown else _columns()
        _print_page(comparison_page(comparison, width), args.markdown)
    return 0


def run_doctor(args: argparse.Namespace) -> int:
    """`shardlab doctor`: a missing target is an answer, exit 0."""
    from shardlab.compile.doctor import targets

    found = targets(deep=args.deep)
    if args.json:
        _print_json({"schema": "shardlab.doctor/1", "targets": [asdict(status) for status in found]})
    else:
        from shardlab.report.doctor import doctor_page

        _print_page(doctor_page(found), markdown=False)
    return 0


def parse_axes(text: str | None) -> dict[str, int] | None:
    """`data=4,model=2` to sizes by name, major to minor. Raises UserError for what is not NAME=SIZE."""
    if text is None:
        return None
    axes: dict[str, int] = {}
    problems = []
    for part in text.split(","):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if not name or not _is_count(size) or name in axes:
            what = f"{name!r} is given twice" if name in axes else f"{part!r} is not NAME=SIZE"
            problems.append(Problem("--axes", what, "write it as data=4,model=2"))
        else:
            axes[name] = int(size)
    if problems:
        raise UserError(*problems)
    return axes


def parse_device_ids(text: str | None) -> tuple[int, ...] | None:
    """`0,1,3,2` to device ids. Raises UserError when one is not a whole number or comes twice."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    wrong = [part for part in parts if not _is_whole(part)]
    if wrong:
        raise UserError(
            *(Problem("--device-ids", f"{part!r} is not a device id", "write 0,1,2,3") for part in wrong)
        )
    if len(set(parts)) < len(parts):
        raise UserError(Problem("--device-ids", "a device comes twice", "list each device of the mesh once"))
    return tuple(int(part) for part in parts)


def _is_whole(text: str) -> bool:
    """A whole number from 0 of at most nine digits: no more devices or sequences than that exist."""
    return re.fullmatch(r"[0-9]{1,9}", text) is not None


def _is_count(text: str) -> bool:
    return _is_whole(text) and int(text) > 0


def _axes_of_mesh(path: str) -> dict[str, int]:
    from shardlab.spec.plan import load_plan

    return dict(load_plan(path).axes)


def _question(args: argparse.Namespace, machines: tuple[str, ...]) -> Question:
    from shardlab.lab.cases import Question

    return Question(
        model=args.model, machines=machines, batch=args.batch, seq=args.seq, workload=args.workload
    )


def _check_writable(path: str) -> None:
    """Before a long compile, not after it."""
    target = Path(path)
    if target.is_dir() or not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
        raise UserError(Problem(path, "cannot be written", "give a file in a directory that exists"))


def _write_program(program: Program | None, hlo: str | None, saved: str | None) -> None:
    from shardlab.program import save, write_atomically

    if program is None or program.refusal is not None:
        for path in filter(None, (hlo, saved)):
            print(f"{path}: not written, there is no compiled program", file=sys.stderr)
        return
    try:
        if hlo:
            write_atomically(Path(hlo), program.hlo_text.encode())
        if saved:
            save(program, saved)
    except OSError as error:
        raise UserError(
            Problem(hlo or saved or "", error.strerror or str(error), "give another file")
        ) from None


def _print_json(document: object) -> None:
    json.dump(document, sys.stdout, indent=2, allow_nan=False)
    sys.stdout.write("\n")


def _print_page(page: Page, markdown: bool) -> None:
    if markdown:
        from shardlab.report.markdown import to_markdown

        sys.stdout.write(to_markdown(page))
        return
    from shardlab.report.terminal import print_page

    print_page(page, sys.stdout)


def _columns() -> int:
    from shardlab.report.terminal import console_on

    return console_on(sys.stdout).width


def _one_line_each(error: ShardlabError) -> str:
    """One line per mistake: newlines inside a problem would look like more of them, and a terminal would obey
    control characters of a name."""
    from shardlab.report.page import visible

    mistakes = error.problems if isinstance(error, UserError) else (error,)
    return "\n".join(visible(" ".join(str(mistake).split())) for mistake in mistakes)
