"""A compiled program, a machine, and what its step takes: against measured products and closed forms."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from case_reports import case, report

from shardlab import prediction
from shardlab.analysis import attribute
from shardlab.case_document import to_json
from shardlab.case_report import CaseReport, report_case
from shardlab.compare import comparison_json, rank
from shardlab.cost.blocks import Block, PathEntry
from shardlab.cost.instructions import step_cost
from shardlab.cost.timeline import Timeline
from shardlab.hardware.catalog import load_machine
from shardlab.hardware.data_files import shipped
from shardlab.hardware.measured import StepErrors, step_errors
from shardlab.prediction import Prediction, predict, predictions_together, transfers
from shardlab.program import Program
from shardlab.report.comparison import RANKINGS, comparison_page
from shardlab.report.explain import explain_page

SAMPLES = Path(__file__).parent / "golden" / "hlo"
GROUPS = "channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, use_global_device_ids=true"
# A product of 4096^3, which XLA's table has at 780.19 TFLOP/s on an H100, and a gather of 8 x 128 MiB.
HLO = f"""\
HloModule step, is_scheduled=true, num_partitions=8

ENTRY main {{
  x = bf16[4096,4096]{{1,0}} parameter(0)
  shard = f32[33554432]{{0}} parameter(1)
  ag = (f32[33554432]{{0}}, f32[268435456]{{0}}) all-gather-start(shard), dimensions={{0}}, {GROUPS}
  y = bf16[4096,4096]{{1,0}} dot(x, x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  ROOT done = f32[268435456]{{0}} all-gather-done(ag)
}}
"""
PRODUCT_S = 2 * 4096**3 / 780.19e12


PAIRS = "_xla_send_recv_source_target_pairs={{0,1},{1,2},{2,3},{3,4},{4,5},{5,6},{6,7}}"
SENT = "(f32[33554432]{0}, u32[], token[])"
SEND_RECV = f"""\
HloModule step, is_scheduled=true, num_partitions=8

ENTRY main {{
  x = bf16[4096,4096]{{1,0}} parameter(0)
  shard = f32[33554432]{{0}} parameter(1)
  tok = token[] after-all()
  r = {SENT} recv(tok), channel_id=3, frontend_attributes={{{PAIRS}}}
  s = {SENT} send(shard, tok), channel_id=3, frontend_attributes={{{PAIRS}}}
  here = (f32[33554432]{{0}}, token[]) recv-done(r), channel_id=3
  y = bf16[4096,4096]{{1,0}} dot(x, x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  ROOT gone = token[] send-done(s), channel_id=3
}}
"""


def program(text: str = HLO, backend: str = "gpu") -> Program:
    return Program(name="step", backend=backend, hlo_text=text, num_devices=8, mesh={"fsdp": 8})


def made(text: str = HLO, machine: str = "h100:1x8") -> CaseReport:
    return report_case(case(machine=machine), program(text), load_machine(machine))


def test_a_product_takes_what_was_measured() -> None:
    alone = "\n".join(line for line in HLO.splitlines() if " ag " not in line and "done" not in line)
    line = predicted(made(alone.replace("  y = ", "  ROOT y = "))).timeline
    assert line.step_time_s == pytest.approx(PRODUCT_S, rel=1e-4)
    assert (line.communication_s, line.exposed_communication_s) == (0, 0)


def test_a_gather_beside_a_product_is_exposed_for_the_rest() -> None:
    found = made()
    assert found.analysis is not None
    (row,) = found.analysis.collectives
    assert row.time_s is not None and row.time_s > PRODUCT_S
    line = predicted(found).timeline
    assert line.step_time_s == pytest.approx(row.time_s)
    assert line.compute_s == pytest.approx(PRODUCT_S, rel=1e-4)
    assert line.exposed_communication_s == pytest.approx(row.time_s - PRODUCT_S, rel=1e-4)


def predicted(found: CaseReport) -> Prediction:
    assert found.predicted is not None
    return found.predicted


HOST = """\
HloModule step, is_scheduled=true, num_partitions=8

ENTRY main {
  x = bf16[256,1048576]{1,0} parameter(0)
  h = bf16[256,1048576]{1,0:S(5)} custom-call(), custom_call_target="AllocateBuffer"
  out = (bf16[256,1048576]{1,0:S(5)}, bf16[256,1048576]{1,0}, u32[]{:S(2)}) copy-start(x)
  back = (bf16[256,1048576]{1,0}, bf16[256,1048576]{1,0:S(5)}, u32[]{:S(2)}) copy-start(h)
  here = bf16[256,1048576]{1,0} copy-done(back)
  ROOT there = bf16[256,1048576]{1,0:S(5)} copy-done(out)
}
"""


def test_copies_to_the_host_and_back_go_on_at_once() -> None:
    """Half a GiB each way at 32 GB/s each way; nothing is computed meanwhile."""
    line = predicted(
        report_case(case(machine="v6e:2x4"), program(HOST, "tpu"), load_machine("v6e:2x4"))
    ).timeline
    assert line.step_time_s == pytest.approx(2**29 / 32e9, rel=1e-3)
    assert {event.stream for event in line.root.events} == {"to host", "from host"}
    assert (line.compute_s, line.communication_s) == (0, 0)


def test_json_has_the_prediction_of_the_contract() -> None:
    found = made()
    document = to_json(found)["prediction"]
    assert isinstance(document, dict)
    step_s = found.step_time_s
    assert step_s is not None and document["step_time_s"] == step_s
    assert document["compute_s"] + document["exposed_communication_s"] == pytest.approx(step_s)
    assert document["exposed_communication_s"] < document["communication_s"]
    # 8 sequences of 128 tokens on 8 devices; model FLOPs over 8 x 989.5 TFLOP/s
    assert document["tokens_per_s_per_device"] == pytest.approx(128 / step_s)
    assert found.model_flops is not None
    assert document["mfu"] == pytest.approx(found.model_flops / (8 * 989.5e12 * step_s))
    assert document["error_class"] == "not validated"
    assert document["basis"]["matmul"] == "measured"
    assert document["critical_path"][0]["name"] == "ag"
    assert json.loads(json.dumps(document)) == document


def test_a_part_that_is_unknown_leaves_the_step_unknown() -> None:
    product = "dot(x, x), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    opaque = HLO.replace(product, 'custom-call(x), custom_call_target="somebody_s_kernel"')
    found = made(opaque)
    document = to_json(found)["prediction"]
    assert isinstance(document, dict)
    assert found.step_time_s is None and "step_time_s" not in document and "mfu" not in document
    assert document["unknown"] == ["y"] and document["communication_s"] == found.communication_s
    assert "no step time: how long y takes is not known" in found.notes


def test_a_transfer_that_is_not_counted_leaves_the_step_unknown() -> None:
    """Its size is not in the text; a send to the host goes where no link is known."""
    unbounded = HLO.replace("f32[33554432]{0} parameter(1)", "f32[?]{0} parameter(1)")
    to_host = SEND_RECV.replace(f"frontend_attributes={{{PAIRS}}}", "is_host_transfer=true")
    for text, name in ((unbounded, "ag"), (to_host, "s")):
        found = predicted(made(text)).timeline
        assert found.step_time_s is None and name in found.unknown


@pytest.mark.parametrize(
    ("text", "machine"), [(HLO, "cpu:8"), (HLO.replace(", is_scheduled=true", ""), "h100:1x8")]
)
def test_emulated_and_unscheduled_programs_have_no_prediction(text: str, machine: str) -> None:
    found = made(text, machine)
    assert found.predicted is None
    assert "step_time_s" not in to_json(found).get("prediction", {})  # type: ignore[operator]


def test_one_slow_device_holds_up_all() -> None:
    (part,) = attribute(program(), machine=load_machine("h100:1x8"))
    slow = predict(part, step_cost(part.module, "gpu"), load_machine("h100:1x8"), slowdown=100.0)
    assert slow is not None
    assert slow.timeline.step_time_s == pytest.approx(100 * PRODUCT_S, rel=1e-4)


def test_a_tpu_chain_is_one_transfer_that_its_last_fusion_ends() -> None:
    """Its start is a fusion, a product carries it, and a third fusion ends it."""
    text = (SAMPLES / "b24_tpu_async_collective_fusion.hlo").read_text()
    (part,) = attribute(text, axes={"data": 4, "model": 4}, machine=load_machine("v5e:4x4"))
    ((place, (one,)),) = transfers(part, load_machine("v5e:4x4")).items()
    instructions = part.module.computations[place[0]].instructions
    assert one.asynchronous and one.done is not None
    assert "start" in place[1] and "done" in one.done
    assert list(instructions).index(place[1]) < list(instructions).index(one.done)


def test_what_is_received_is_awaited_where_it_is_used() -> None:
    """The product stands after the recv-done: nothing hides the transfer, though its send-done comes last."""
    found = made(SEND_RECV)
    assert found.analysis is not None
    (row,) = found.analysis.collectives
    assert row.time_s
    line = predicted(found).timeline
    assert line.step_time_s == pytest.approx(row.time_s + PRODUCT_S, rel=1e-4)
    assert line.exposed_communication_s == pytest.approx(row.time_s)


def time_line(step_s: float | None) -> Prediction:
    entry = PathEntry(name="y", kind="fusion", stream="compute", layer="layers/mlp", axes=None, time_s=1.0)
    block = Block(events=(), duration_s=1.0, compute_s=1.0, communication_s=0.0, exposed_s=0.0, path=())
    line = Timeline(
        step_time_s=step_s,
        compute_s=step_s,
        communication_s=0.25,
        exposed_communication_s=0.125,
        critical_path=(entry,),
        root=block,
    )
    return Prediction(timeline=line, basis=(("matmul", "measured"),))


def test_plans_are_ranked_by_step_time_where_all_have_one() -> None:
    """The plan that communicates less is the slower one."""
    slow = report("slow", 0.5, predicted=time_line(2.0))
    fast = report("fast", 0.9, predicted=time_line(1.0))
    both = rank([slow, fast])
    assert [one.case.plan.name for one in both.ranked] == ["fast", "slow"]
    assert comparison_json(both)["ranked_by"] == "step_time_s"
    assert comparison_page(both).tables[0].title == RANKINGS["step_time_s"]
    one = rank([slow, replace(fast, predicted=time_line(None))])
    assert [each.case.plan.name for each in one.ranked] == ["slow", "fast"]
    assert comparison_json(one)["ranked_by"] == "communication_s"
    assert comparison_page(one).tables[0].title == RANKINGS["communication_s"]


def test_explain_shows_the_step_and_its_critical_path() -> None:
    page = explain_page(made())
    facts = dict(page.facts)
    assert facts["step time"].endswith("predicted, not validated")
    assert facts["prices"] == "matmul measured; memory measured; attention measured"
    table = next(table for table in page.tables if table.title == "Critical path")
    assert len(table.rows) == 1


@pytest.mark.parametrize(
    ("turns_s", "said", "document"),
    [
        pytest.param((0.1, 0.3), "500 ms less or more", 0.5, id="two runs of 0.1 s and one of 0.3"),
        pytest.param((0.1, None), "unknown how much less or more", None, id="unknown is not 0"),
    ],
)
def test_what_turns_leave_open_adds_up(
    turns_s: tuple[float | None, float | None], said: str, document: float | None
) -> None:
    one, other = (replace(time_line(1.0), turns_s=each) for each in turns_s)
    both = predictions_together([("a", 2, one), ("b", 1, other)])
    assert both is not None and both.turns_s == document
    found = report("r", 0.5, predicted=both)
    assert dict(explain_page(found).facts)["turns"].startswith(said)
    shown = to_json(found)["prediction"]
    assert isinstance(shown, dict) and shown["turns_s"] == document


def test_without_gloo_nothing_is_said_of_turns() -> None:
    assert "turns" not in dict(explain_page(made()).facts)
    shown = to_json(made())["prediction"]
    assert isinstance(shown, dict) and "turns_s" not in shown


BRANCHES = """\
HloModule step, is_scheduled=true, num_partitions=8

small {
  x = bf16[4096,4096]{1,0} parameter(0)
  ROOT y = bf16[4096,4096]{1,0} dot(x, x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

large {
  x = bf16[4096,4096]{1,0} parameter(0)
  y = bf16[4096,4096]{1,0} dot(x, x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT z = bf16[4096,4096]{1,0} dot(y, x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY main {
  x = bf16[4096,4096]{1,0} parameter(0)
  which = pred[] parameter(1)
  ROOT y = bf16[4096,4096]{1,0} conditional(which, x, x), true_computation=small, false_computation=large
}
"""


def test_a_chip_is_busy_with_one_branch_and_not_with_all() -> None:
    """Stages of a pipeline are branches: summed, a stage would be busy with what the others do."""
    (part,) = attribute(program(BRANCHES))
    predicted = predict(part, step_cost(part.module, "gpu"), load_machine("h100:1x8"))
    assert predicted is not None
    assert predicted.busy_s == pytest.approx(2 * 2 * 4096**3 / 989.5e12, rel=1e-3)


ATTENTION = """\
HloModule step, is_scheduled=true, num_partitions=8

ENTRY main {
  q = bf16[1,8192,32,128]{3,2,1,0} parameter(0)
  call = (bf16[1,32,8192,128]{3,2,1,0}, u8[0]{0}) custom-call(q, q, q), \
custom_call_target="__cudnn$fmhaSoftmax", \
backend_config={"cudnn_fmha_backend_config":{"intermediate_tensor_shape":{"dimensions":["1","32","8192","8192"]},\
"mask_type":"NO_MASK"}}
  ROOT out = bf16[1,32,8192,128]{3,2,1,0} get-tuple-element(call), index=0
}
"""


def test_a_fused_call_may_be_priced_as_another_kernel() -> None:
    """FlashAttention-2 reaches 370 TFLOP/s where cuDNN reaches 600 (8,192 tokens, heads of 128, no mask)."""
    (part,) = attribute(program(ATTENTION))
    cost, machine = step_cost(part.module, "gpu"), load_machine("h100:1x8")
    times = []
    for kernel in ("cudnn", "flash-attention-2"):
        predicted = predict(part, cost, machine, attention_kernel=kernel)
        assert predicted is not None
        times.append(predicted.timeline.step_time_s or 0.0)
    assert times[1] / times[0] == pytest.approx(600 / 370, rel=0.01)


def test_a_prediction_says_how_far_off_published_steps_were_on_its_chip(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    errors = StepErrors(rows=32, mean_error_pct=8.4, worst_error_pct=-20.0, sources="s", date="2026-01-01")
    monkeypatch.setattr(prediction, "step_errors", lambda: {"a100": errors})
    known, unknown = (prediction.error_class(load_machine(name).chip) for name in ("a100:1x8", "h100:1x8"))
    assert (known, unknown) == ("±8 % on this kind of machine, n = 32", "not validated")


def test_error_classes_are_of_chips_that_are_shipped() -> None:
    assert set(step_errors()) <= set(shipped("chips"))
    assert all(found.rows >= 5 and found.mean_error_pct >= 0 for found in step_errors().values())
