"""The flags of every verb, and what their values mean. `cli` runs the verbs."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from fractions import Fraction
from typing import NoReturn

from shardlab.errors import Problem, UserError

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
  shardlab analyze step.program --mesh plan.toml --why all-gather-start.3
  XLA_FLAGS=--xla_dump_to=dump python train.py; shardlab analyze dump --mesh plan.toml --strict
"""
EXPLAIN_EXAMPLES = """\
examples:
  shardlab explain meshes/cpu8-fsdp.toml --model gpt2-124m
  shardlab explain plan.toml --model llama3-70b --on v5p:8x8x8 --save step.program
  shardlab explain meshes/cpu8-fsdp.toml --step experiments.steps.mlp:make_step
  shardlab explain plan.toml --model llama3-70b --html report.html
"""
COMPARE_EXAMPLES = """\
examples:
  shardlab compare meshes/cpu8-*.toml --model gpt2-124m
  shardlab compare plan.toml --model llama3-70b --on cpu:512,h100:64x8,v5p:8x8x8
"""


FIT_EXAMPLES = """\
examples:
  shardlab fit --model llama3-8b --on h100:1x8
  shardlab fit meshes/h100x8-fsdp8.toml --model llama3-8b --seq 8192 --json
"""
SEARCH_EXAMPLES = """\
examples:
  shardlab search --model llama3-8b --on h100:1x8 --batch 32
  shardlab search --model llama3-70b --on v5p:4x4x4 --save best.toml
  shardlab search --step train.steps:make_step --axes data,tensor --on h100:1x8
"""
DIFF_EXAMPLES = """\
BASE and HEAD are JSON of analyze or explain, saved programs, HLO dumps, or mesh files, which are compiled
with their [check] unless flags say otherwise; or git revisions: A..B, A...B (since B left A), or A alone
against the working tree. Then the plans under PATH (default: meshes/) that changed are compared, all of them
where the sources that build their programs did. Revisions of shardlab itself run their own code.

examples:
  shardlab diff base.json head.json
  shardlab diff base.program head.program --on h100:64x8 --markdown
  shardlab diff meshes/cpu8-fsdp.toml meshes/cpu8-tensor.toml --model tiny
  shardlab diff main..HEAD -- meshes/ --on h100:64x8,v5p:8x8x8 --markdown
"""
CHECK_EXAMPLES = """\
Each plan is compiled with its [check] and compared with PLAN.baseline.json and budgets.toml beside it.

examples:
  shardlab check meshes/cpu8-fsdp.toml --update    write the baseline, then commit it
  shardlab check                                   every plan of meshes/; exit 1 when one is broken
  shardlab check --since origin/main --python old/bin/python --markdown
"""
RECORD_EXAMPLES = """\
COMMAND runs as it is, with JAX from 0.4.26 on, in whichever environment its Python has. What ran, and how
often, goes to a folder, which analyze reads again. Where shardlab is not installed, its file record.py does
the same by itself: python record.py --out DIR -- COMMAND

examples:
  shardlab record -- python train.py --steps=20
  shardlab record --steps 20 --on h100:1x8 -- python train.py --steps=20
"""


DOCTOR_EXAMPLES = """\
examples:
  shardlab doctor
  shardlab doctor --deep      prove each target with a tiny compile
"""
COMPLETION_EXAMPLES = """\
examples:
  eval "$(shardlab completion bash)"                          in ~/.bashrc
  shardlab completion zsh > ~/.zsh/completions/_shardlab      a folder of $fpath
"""


class _Parser(argparse.ArgumentParser):
    """argparse whose mistakes are one line on standard error, exit code 2."""

    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"{self.prog}: {message}; see {self.prog} --help\n")
        raise SystemExit(2)


PATHS = "--paths"  # how `--` of diff is read: paths up to the next flag


def with_paths(argv: Sequence[str]) -> list[str]:
    """The words of a command line, in which `diff … -- PATH… --flag` may go on with flags after its paths."""
    words = list(argv)
    if words[:1] == ["diff"] and "--" in words:
        words[words.index("--")] = PATHS
    return words


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
    _add_fit(_verb(verbs, "fit", "what fits on a machine, and what each change buys", FIT_EXAMPLES))
    _add_search(
        _verb(verbs, "search", "compile the plans a machine suggests, and rank them", SEARCH_EXAMPLES)
    )
    _add_diff(_verb(verbs, "diff", "what a change does to a step", DIFF_EXAMPLES))
    _add_check(_verb(verbs, "check", "plans against their committed baselines and budgets", CHECK_EXAMPLES))
    _add_record(_verb(verbs, "record", "what a JAX trainer runs, with no change to it", RECORD_EXAMPLES))
    doctor = _verb(verbs, "doctor", "which targets this machine can compile for", DOCTOR_EXAMPLES)
    doctor.add_argument("--deep", action="store_true", help="prove each target with a tiny compile")
    doctor.add_argument("--json", action="store_true", help="print one JSON document")
    completion = _verb(verbs, "completion", "a script that completes these flags", COMPLETION_EXAMPLES)
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="for which shell")
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
    _add_reading(verb)


def _add_record(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="after --")
    verb.add_argument("--out", metavar="DIR", default="recorded", help="folder to write (default: recorded)")
    _add_reading(verb)


def _add_reading(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--steps",
        type=_positive,
        metavar="N",
        help="of a recording: how many steps ran (default: as many as its most frequent program)",
    )
    mesh = verb.add_mutually_exclusive_group()
    mesh.add_argument("--axes", metavar="A=N,B=M", help="mesh axes, major to minor")
    mesh.add_argument("--mesh", metavar="FILE", help="take the axes from this mesh file")
    verb.add_argument(
        "--device-ids", metavar="0,1,…", help="the device at each position of the mesh, row-major"
    )
    verb.add_argument("--on", metavar="MACHINE", help="price the traffic on this machine, such as h100:64x8")
    _add_order(verb)
    verb.add_argument("--audit", action="store_true", help="list what could be saved, and how")
    _add_why(verb)
    verb.add_argument("--strict", action="store_true", help="exit 1 when something was not counted exactly")
    _add_format(verb)
    _add_html(verb)


def _add_explain(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("mesh", metavar="MESH", help="mesh file (TOML)")
    verb.add_argument(
        "--on", metavar="MACHINE", help="the plan's own machine unless said: cpu:8, h100:64x8, v5p:8x8x8"
    )
    _add_workload(verb)
    _add_step(verb)
    _add_order(verb)
    slow = "also predict the step with one device whose compute takes so many times as long: 1.2"
    verb.add_argument("--straggler", type=_slowdown, metavar="FACTOR", help=slow)
    _add_why(verb)
    _add_cache(verb)
    _add_format(verb)
    _add_html(verb)
    verb.add_argument("--hlo", metavar="FILE", help="write the compiled HLO text")
    verb.add_argument("--save", metavar="FILE", help="write the whole program, for analyze")
    verb.add_argument("--trace", metavar="FILE", help="write the predicted step as a Perfetto/Chrome trace")


def _add_compare(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("meshes", nargs="+", metavar="MESH", help="mesh files (TOML)")
    verb.add_argument("--on", metavar="M1,M2,…", help="machines; each plan's own unless said")
    _add_workload(verb)
    _add_step(verb)
    _add_jobs(verb)
    _add_cache(verb)
    _add_format(verb)
    _add_html(verb)


def _add_fit(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("mesh", nargs="?", metavar="MESH", help="mesh file (default: FSDP over all devices)")
    verb.add_argument("--on", metavar="MACHINE", help="such as h100:1x8, v5e:4x4 (default: the plan's own)")
    _add_workload(verb)
    _add_cache(verb)
    _add_format(verb)


def _add_search(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--on", required=True, metavar="MACHINE", help="such as h100:8x8, v5p:4x4x4")
    _add_workload(verb)
    _add_step(verb)
    verb.add_argument(
        "--axes", metavar="A,B", help="with --step: the mesh axes of every grid, major to minor"
    )
    verb.add_argument("--save", metavar="FILE", help="write the mesh file of the best plan")
    _add_jobs(verb)
    _add_cache(verb)
    _add_format(verb)


def _add_diff(verb: argparse.ArgumentParser) -> None:
    verb.usage = "shardlab diff BASE HEAD [flags]\n       shardlab diff A..B [-- PATH...] [flags]"
    verb.add_argument(
        "base", metavar="BASE", help="before: JSON, saved program, HLO dump, mesh file; or A..B, A...B, A"
    )
    verb.add_argument("head", metavar="HEAD", nargs="?", help="the same, after")
    verb.add_argument(PATHS, dest="paths", nargs="*", metavar="PATH", help=argparse.SUPPRESS)
    verb.add_argument(
        "--on", metavar="M1,M2,…", help="the machines of mesh files; one, to price programs and dumps"
    )
    verb.add_argument("--axes", metavar="A=N,B=M", help="mesh axes of programs and dumps, major to minor")
    _add_workload(verb)
    _add_step(verb)
    _add_cache(verb)
    _add_format(verb)
    _add_html(verb)


def _add_check(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("meshes", nargs="*", metavar="MESH", help="mesh files (default: all of meshes/)")
    verb.add_argument("--update", action="store_true", help="write the baselines")
    verb.add_argument(
        "--tolerance", type=_percentage, metavar="PCT", default="1", help="how much worse passes (default: 1)"
    )
    _add_step(verb)
    verb.add_argument(
        "--since", metavar="REV", help="also say which budgets and baselines moved since this git revision"
    )
    verb.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="PATH",
        help="a Python with another jax: tells a new compiler's part of a change from yours; may be repeated",
    )
    _add_jobs(verb)
    _add_cache(verb)
    _add_format(verb)


def _add_cache(verb: argparse.ArgumentParser) -> None:
    where = verb.add_mutually_exclusive_group()
    where.add_argument(
        "--cache",
        metavar="DIR",
        help="where compiled programs are kept, 2 GiB of them at most, those used last (default: "
        "$SHARDLAB_CACHE, else this system's folder for caches)",
    )
    where.add_argument("--no-cache", action="store_true", help="compile everything, and keep nothing")


def _add_jobs(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--jobs", type=_positive, metavar="N", help="compiles at a time (default: by cores and memory)"
    )


def _add_workload(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--model", metavar="NAME", help="such as gpt2-124m, llama3-70b (default: the plan's [check])"
    )
    verb.add_argument("--batch", type=_positive, metavar="N", help="global batch in sequences")
    verb.add_argument("--seq", type=_positive, metavar="N", help="tokens per sequence")
    verb.add_argument(
        "--workload", choices=("train", "prefill", "decode"), help="default: the plan's [check], else train"
    )


def _add_step(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--step",
        metavar="MODULE:FUNCTION",
        help="your own step function, called with the mesh, instead of a model (default: as in [check])",
    )


def _add_order(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--order", action="store_true", help="price other device orders of the same program")


def _add_format(verb: argparse.ArgumentParser) -> None:
    formats = verb.add_mutually_exclusive_group()
    formats.add_argument("--json", action="store_true", help="print one JSON document")
    formats.add_argument("--markdown", action="store_true", help="print Markdown")


def _add_why(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--why", metavar="NAME", help="why one collective is there, by its name in the table")


def _add_html(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--html", metavar="FILE", help="write a report for the browser: one file, no network")


def _positive(text: str) -> int:
    if not _is_count(text):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number above 0")
    return int(text)


def _percentage(text: str) -> Fraction:
    """A share from `1`, `0.5` or `1%`."""
    number = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,6})?) ?%?", text)
    if number is None:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a percentage such as 1 or 0.5")
    return Fraction(number[1]) / 100


def _slowdown(text: str) -> float:
    """A factor of at least 1 such as 1.2."""
    if re.fullmatch(r"[0-9]{1,6}(?:\.[0-9]{1,6})?", text) is None or float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a factor of at least 1 such as 1.2")
    return float(text)


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
