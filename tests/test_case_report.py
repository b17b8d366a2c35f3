"""What is known of one case, and its JSON: what is not known is absent, never zero."""

from __future__ import annotations

import json

import pytest
from bare_links import bare
from case_reports import GB, case, refused, report

from shardlab.case_document import to_json
from shardlab.case_report import NOT_AUTOTUNED_NOTE, CaseReport, figures_of_case, report_case
from shardlab.cost.flops import model_flops
from shardlab.hardware.catalog import load_machine
from shardlab.program import Memory, Program, Refusal
from shardlab.report.cost import token_text

# Per device and step: a product of 2·64·32·16 = 65,536 FLOPs, run three times by the loop; one all-gather of
# 8 · 1,024 f32 = 32,768 bytes, of which a device sends 7/8 = 28,672.
HLO = """\
HloModule step, num_partitions=8

body {
  state = (s32[], f32[64,16]{1,0}) parameter(0)
  i = s32[] get-tuple-element(state), index=0
  one = s32[] constant(1)
  next = s32[] add(i, one)
  x = f32[64,16]{1,0} get-tuple-element(state), index=1
  w = f32[16,32]{1,0} constant({...})
  y = f32[64,32]{1,0} dot(x, w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT out = (s32[], f32[64,16]{1,0}) tuple(next, x)
}

condition {
  state.1 = (s32[], f32[64,16]{1,0}) parameter(0)
  j = s32[] get-tuple-element(state.1), index=0
  three = s32[] constant(3)
  ROOT less = pred[] compare(j, three), direction=LT
}

ENTRY main {
  p = f32[64,16]{1,0} parameter(0)
  shard = f32[1024]{0} parameter(1)
  zero = s32[] constant(0)
  first = (s32[], f32[64,16]{1,0}) tuple(zero, p)
  loop = (s32[], f32[64,16]{1,0}) while(first), condition=condition, body=body
  ROOT whole = f32[8192]{0} all-gather(shard), channel_id=1, dimensions={0},
    replica_groups={{0,1,2,3,4,5,6,7}}, use_global_device_ids=true
}
"""


def program(**changes: object) -> Program:
    facts = {"name": "step", "backend": "gpu", "hlo_text": HLO, "num_devices": 8, "mesh": {"fsdp": 8}}
    facts["memory"] = Memory(argument_bytes=10 * GB, temp_bytes=20 * GB, peak_bytes=30 * GB)
    return Program(**(facts | changes))  # type: ignore[arg-type]


def test_a_report_joins_memory_flops_and_time() -> None:
    machine = bare("h100:1x8")
    made = report_case(case(), program(), machine)
    assert made.hardware_flops == 3 * 65_536
    assert made.cost is not None
    # A trip reads x (4,096 bytes) and w (2,048) and writes y (8,192); the gather reads 4,096, writes 32,768.
    # The loop's own counter and test: 8 + 4 bytes in each of 3 trips, 8 + 1 in each of 4 tests.
    assert made.cost.read_bytes == 3 * (4_096 + 2_048) + 4_096 + 3 * 8 + 4 * 8
    assert made.cost.written_bytes == 3 * 8_192 + 32_768 + 3 * 4 + 4 * 1
    assert made.model_flops == model_flops(case().model, 8, 128, "train")
    assert made.memory is not None
    assert (made.memory.peak_bytes, made.memory.fits) == (30 * GB, "yes")
    assert made.analysis is not None
    assert made.analysis.totals.wire_bytes == (28_672, 28_672)
    rate = machine.domains[0].bytes_per_s
    assert rate is not None
    assert made.communication_s == pytest.approx(28_672 / rate)
    assert made.tier_s == {"nvlink": made.communication_s}
    assert not made.emulated


def test_the_figures_of_a_baseline_are_those_of_the_report() -> None:
    machine = load_machine("h100:1x8")
    whole, figures = (make(case(), program(), machine) for make in (report_case, figures_of_case))
    assert figures.hardware_flops == whole.hardware_flops == 3 * 65_536
    assert (figures.memory, figures.analysis) == (whole.memory, whole.analysis)
    assert figures.predicted is None


def test_one_program_is_priced_on_every_machine() -> None:
    """Eight GPUs in one host, or one in each of eight: the same bytes, another time."""
    near = report_case(case(), program(), load_machine("h100:1x8"))
    far = report_case(case(), program(), load_machine("h100:8x1"))
    assert near.analysis is not None and far.analysis is not None
    assert near.analysis.totals.wire_bytes == far.analysis.totals.wire_bytes
    assert near.communication_s is not None and far.communication_s is not None
    assert near.communication_s < far.communication_s


def test_emulated_devices_have_no_time_and_no_verdict() -> None:
    made = report_case(case(machine="cpu:8"), program(), load_machine("cpu:8"))
    assert made.emulated
    assert made.communication_s is None
    assert made.memory is not None and made.memory.fits is None
    assert "communication_s" not in to_json(made).get("prediction", {})  # type: ignore[operator]


def test_a_refused_program_has_its_deficit_and_no_analysis() -> None:
    refusal = Refusal(needed_bytes=33 * GB, limit_bytes=16 * GB, largest_batch=4)
    made = report_case(case(), program(hlo_text="", refusal=refusal, memory=None), load_machine("v5e:2x4"))
    assert made.analysis is None and made.hardware_flops is None
    document = to_json(made)
    assert "analysis" not in document and "prediction" not in document
    assert document["memory"] == {
        "peak_bytes": 33 * GB,
        "limit_bytes": 16 * GB,
        "limit_source": "the compiler, which refused the program",
        "deficit_bytes": 17 * GB,
        "fits": "no",
        "needed_bytes": 33 * GB,
        "largest_batch": 4,
    }


def test_a_program_that_was_not_autotuned_says_so() -> None:
    assert NOT_AUTOTUNED_NOTE in report_case(case(), program(autotuned=False), load_machine("h100:1x8")).notes
    assert NOT_AUTOTUNED_NOTE not in report_case(case(), program(), load_machine("h100:1x8")).notes


def test_json_has_every_member_of_the_contract() -> None:
    document = to_json(report("fsdp8", 0.5, notes=("a note",)))
    assert document["schema"] == "shardlab.report/1"
    assert document["notes"] == ["a note"]
    assert document["compute"] == {"flops": 2 * 10**14, "model_flops": 16 * 10**14}
    assert document["prediction"] == {"communication_s": 0.5, "communication_by_tier_s": {"nvlink": 0.5}}
    assert document["memory"] == {
        "argument_bytes": 40 * GB,
        "temp_bytes": 20 * GB,
        "peak_bytes": 60 * GB,
        "needed_bytes": 60 * GB,
        "limit_bytes": 80 * GB,
        "limit_source": "by hand",
        "deficit_bytes": 0,
        "fits": "yes",
    }
    described = document["case"]
    assert isinstance(described, dict)
    assert (described["plan"], described["model"], described["machine"]) == ("fsdp8", "tiny", "h100:1x8")
    assert (described["batch"], described["seq"], described["workload"]) == (8, 128, "train")
    assert json.loads(json.dumps(document)) == document


def test_a_decode_step_says_what_a_token_costs() -> None:
    """Eight sequences: 28,672 bytes sent are 3,584 a token. What training would say of tokens is absent."""
    machine = load_machine("h100:1x8")
    made = report_case(case().model_copy(update={"workload": "decode"}), program(), machine)
    assert made.cost is not None and made.cost.read_bytes is not None and made.cost.written_bytes is not None
    assert to_json(made)["generation"] == {
        "tokens_per_step": 8,
        "hbm_bytes_per_token_per_device": (made.cost.read_bytes + made.cost.written_bytes) / 8,
        "wire_bytes_per_token_per_device": 3_584,
    }
    assert "generation" not in to_json(report_case(case(), program(), machine))
    assert token_text(made) is not None
    assert "3.58 kB sent" in str(token_text(made))


@pytest.mark.parametrize(("backend", "elsewhere"), [("gpu", 0), ("tpu", 3 * 2_048)])
def test_memory_spaces_are_those_of_the_backend(backend: str, elsewhere: int) -> None:
    """Space 1 holds w, which each trip reads: VMEM of a TPU, a part of a GPU's HBM."""
    text = HLO.replace("w = f32[16,32]{1,0}", "w = f32[16,32]{1,0:S(1)}")
    made = report_case(case(), program(hlo_text=text, backend=backend), load_machine("h100:1x8"))
    assert made.cost is not None
    assert made.cost.other_bytes == elsewhere


def test_json_lists_instructions_only_when_asked() -> None:
    made = report_case(case(), program(), load_machine("h100:1x8"))
    assert "instructions" not in to_json(made)
    document = to_json(made, instructions=True)
    compute = document["compute"]
    assert isinstance(compute, dict)
    assert (compute["flops"], compute["matmul_flops"], compute["recompute_flops"]) == (
        3 * 65_536,
        3 * 65_536,
        0,
    )
    rows = document["instructions"]
    assert isinstance(rows, list)
    (product,) = (row for row in rows if row["name"] == "y")
    assert product["executions"] == [3, 3]
    assert (product["matmul_flops"], product["attention_flops"]) == (65_536, 0)
    assert (product["hbm_read_bytes"], product["hbm_written_bytes"]) == (6_144, 8_192)
    assert product["flops_per_byte"] == pytest.approx(65_536 / 14_336)
    assert json.loads(json.dumps(document)) == document


@pytest.mark.parametrize(
    ("made", "key", "reason"),
    [
        (
            CaseReport(case=case(), infeasible="12 heads over 8 devices"),
            "infeasible",
            "12 heads over 8 devices",
        ),
        (CaseReport(case=case(), failure="no libtpu"), "failure", "no libtpu"),
    ],
    ids=["infeasible", "failure"],
)
def test_a_case_without_answer_has_a_reason_and_nothing_else(made: CaseReport, key: str, reason: str) -> None:
    document = to_json(made)
    assert document[key] == reason
    assert set(document) == {"schema", "case", "notes", key}


def test_a_refusal_of_every_batch_has_no_largest_one() -> None:
    assert "largest_batch" not in to_json(refused("a", 33, 16, None))["memory"]  # type: ignore[operator]
