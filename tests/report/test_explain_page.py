"""The page of `explain` and `analyze`, from reports made by hand."""

from __future__ import annotations

import io
from dataclasses import replace
from fractions import Fraction

from bare_links import bare
from case_reports import GB, analysis, case, collective, refused, report

from shardlab.analysis import analyze
from shardlab.audit import Finding
from shardlab.case_report import EMULATED_NOTE, CaseReport
from shardlab.cost.owners import Owners
from shardlab.program import CompilerWarning, Flags, Program
from shardlab.report.breakdown import analysis_page
from shardlab.report.explain import explain_page
from shardlab.report.markdown import to_markdown
from shardlab.report.page import Page, Table
from shardlab.report.terminal import print_page
from shardlab.units import format_seconds


def texts(table: Table) -> list[list[str]]:
    return [["\n".join(line.text for line in value) for value in row] for row in table.rows]


def table(page: Page, title: str) -> Table:
    return next(one for one in page.tables if one.title.startswith(title))


def test_every_breakdown_is_there() -> None:
    page = explain_page(report())
    names = [one.title for one in page.tables]
    assert names == [
        "By kind",
        "By mesh axes",
        "By phase",
        "By layer",
        "By link",
        "Collectives by bytes sent",
    ]
    assert texts(table(page, "By kind")) == [["all-gather", "16 GB", "14 GB", "100 %"]]
    assert texts(table(page, "By link")) == [["nvlink", "14 GB", "500 ms"]]


def test_who_holds_the_memory_is_shown_with_the_rest() -> None:
    owners = Owners({"optimizer": 6 * GB, "activations": 2 * GB}, -GB)
    shown = table(explain_page(report(owners=owners)), "Memory")
    assert texts(shown) == [["optimizer", "6 GB", "75 %"], ["activations", "2 GB", "25 %"]]
    assert "1 GB counted twice" in shown.caption
    assert (
        "3 GB more"
        in table(explain_page(report(owners=replace(owners, unexplained_bytes=3 * GB))), "Memory").caption
    )


def test_a_collective_is_named_with_its_source() -> None:
    assert texts(table(explain_page(report()), "Collectives")) == [
        [
            "14 GB\n×2 7 GB",
            "all-gather bf16\nall-gather.1",
            "fsdp\n1 × 8, nvlink",
            "forward\nlayers/mlp/gate\ntransformer.py:112",
        ]
    ]


def test_only_the_largest_are_listed_and_the_rest_is_summed() -> None:
    rows = [collective(f"g.{gb}", executions=(1, 1), wire_bytes=Fraction(gb * GB)) for gb in (1, 2, 3, 4)]
    shown = table(explain_page(report(analysis=analysis(*rows)), top=2), "The 2 collectives")
    assert [row[1].split("\n")[1] for row in texts(shown)] == ["g.4", "g.3"]
    assert shown.caption == "2 smaller ones not shown, 3 GB together; --json has all"


def test_bounds_and_unknown_counts_are_not_hidden() -> None:
    ragged = collective("r", kind="ragged-all-to-all", bound="upper", executions=(0, None))
    row = texts(table(explain_page(report(analysis=analysis(collective(), ragged))), "Collectives"))[1]
    assert row[0] == "unknown\n×0 at least at most 7 GB"


def test_facts_say_what_the_case_is() -> None:
    facts = dict(explain_page(report()).facts)
    assert facts["mesh"] == "fsdp 8"
    assert facts["workload"] == "train, batch 8 sequences of 128 tokens"
    assert facts["FLOPs"] == "200 TFLOP per device and step, as compiled"
    assert (
        facts["memory"]
        == "60 GB reserved, 60 GB at the compiler's peak, arguments 40 GB, temporaries 20 GB, "
        "limit 80 GB (by hand), fits"
    )


FINDING = Finding(
    rule="gathered-wide",
    instruction="g|<b>[red]\x1b[31m",
    axes=("fsdp",),
    wire_bytes=(Fraction(3 * GB), Fraction(3 * GB)),
    source="transformer.py:112",
    evidence="all is converted.",
    remedy="Convert first.",
)


def test_findings_are_a_section_of_their_own() -> None:
    page = explain_page(report(findings=(FINDING, replace(FINDING, wire_bytes=None, axes=None))))
    shown = texts(table(page, "Audit"))
    where = f"{FINDING.instruction}\nfsdp\ntransformer.py:112"
    assert shown[0] == ["3 GB", "gathered-wide\nall is converted.", where, "Convert first."]
    assert shown[1][0] == "unknown"
    memory = explain_page(report(findings=(replace(FINDING, wire_bytes=None, memory_bytes=2 * GB),)))
    assert texts(table(memory, "Audit"))[0][0] == "2 GB of memory"
    assert "Audit" not in {one.title for one in explain_page(report()).tables}


def test_names_in_findings_are_data_to_every_writer() -> None:
    page = explain_page(report(findings=(FINDING,)))
    assert "`g\\|<b>[red]\\x1b[31m`" in to_markdown(page)
    out = io.StringIO()
    print_page(page, out)
    assert "\x1b" not in out.getvalue()


def test_warnings_and_rejected_flags_are_shown() -> None:
    program = Program(
        name="step",
        backend="gpu",
        hlo_text="HloModule m",
        num_devices=8,
        warnings=(CompilerWarning(kind="involuntary full rematerialization", text="…", names=("%dot.1",)),),
        flags=Flags(requested=("--a", "--b"), effective=("--a",), rejected=(("--b", "unknown flag"),)),
    )
    page = explain_page(report(program=program))
    assert texts(table(page, "The compiler warned")) == [["involuntary full rematerialization", "%dot.1"]]
    assert texts(table(page, "Flags rejected")) == [["--b", "unknown flag"]]


def test_a_case_without_analysis_says_why() -> None:
    infeasible = CaseReport(case=case(), infeasible="12 heads over 8 devices")
    assert dict(explain_page(infeasible).facts)["no analysis"] == "infeasible: 12 heads over 8 devices"
    assert dict(explain_page(refused("big", 33, 16, None)).facts)["no analysis"].startswith(
        "does not fit: needs 33 GB"
    )


def test_emulated_devices_carry_their_note() -> None:
    assert explain_page(report(emulated=True, notes=("more",))).notes == (EMULATED_NOTE, "more")


def test_an_analysed_dump_needs_no_case() -> None:
    page = analysis_page(analysis())
    assert dict(page.facts) == {
        "module": "jit_step",
        "backend": "gpu, 8 devices",
        "mesh": "fsdp 8",
        "machine": "h100:1x8",
        "sent": "14 GB per device and step",
        "comm. time": "40.0 ms of collectives one after another; no compute, no overlap",  # twice 20 ms
    }
    assert [one.title for one in page.tables] == [one.title for one in explain_page(report()).tables]


def test_an_analysed_dump_on_a_machine_says_how_long_its_links_work() -> None:
    # One reduce-scatter over 4 of a host's 8 GPUs: 3/4 of 4 MiB at NVLink's 450 GB/s one way.
    text = """HloModule m, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

ENTRY %main {
  %x = f32[1048576]{0} parameter(0)
  ROOT %r = f32[262144]{0} reduce-scatter(%x), channel_id=1, replica_groups=[2,4]<=[8], use_global_device_ids=true, dimensions={0}, to_apply=%add
}
"""  # noqa: E501
    made = analyze(text, axes={"data": 2, "model": 4}, machine=bare("h100:1x8"))
    page = analysis_page(made)
    seconds = 3 / 4 * 4 * 2**20 / 450e9
    assert dict(page.facts)["comm. time"].startswith(format_seconds(seconds))
    assert texts(table(page, "By link")) == [["nvlink", "3.15 MB", format_seconds(seconds)]]


def test_without_a_machine_there_is_no_time() -> None:
    assert "comm. time" not in dict(analysis_page(replace(analysis(), machine=None)).facts)
