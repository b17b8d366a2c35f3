"""Published rows: each is a case or says why not; statistics by hand; one run on programs that are there."""

from __future__ import annotations

import csv
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import validate
from absl.testing import flagsaver
from validation import programs as kept
from validation.analysed import Analysed, analysed
from validation.efficiency import (
    Eager,
    at_efficiency,
    efficiency_of,
    fitted_launch_s,
    fitted_on,
    taken_from,
)
from validation.error_classes import FILE, error_class_rows, write_error_classes
from validation.gpu_rows import (
    KEPT,
    attached_gpu,
    figure_1_baselines,
    korthikanti,
    torchtitan,
    vtrain_single_node,
)
from validation.memory import Layout
from validation.outcome import Outcome, energy_outcomes, figure_1_outcomes
from validation.programs import Programs
from validation.row import Row, read_table
from validation.scores import Score, ranks, score, spearman, top1_regret
from validation.substitution import SHARED_LAYERS, SHARED_MICROBATCHES
from validation.tables import group_lines, score_lines
from validation.tpu_rows import remat_of, tpu_recipes

from shardlab.compile import program_key
from shardlab.errors import CompileFailed
from shardlab.hardware.catalog import load_machine
from shardlab.program import Program
from shardlab.spec.case import Case
from shardlab.spec.models import MODELS
from shardlab.spec.param_counts import num_params

GIB = 1 << 30


def test_errors_by_hand() -> None:
    found = score([(10.0, 11.0), (20.0, 18.0), (30.0, 36.0)])  # +10 %, -10 %, +20 %
    assert found == Score(
        pairs=3,
        mean=pytest.approx(0.4 / 3),
        worst=pytest.approx(0.2),
        bias=pytest.approx(0.2 / 3),
        spearman=pytest.approx(1.0),
    )
    assert score([]) is None


def test_rank_correlation_by_hand() -> None:
    """1 - 6 Σd² / (n (n² - 1)) without ties; ties share their mean rank."""
    assert spearman([(1.0, 2.0), (2.0, 1.0), (3.0, 3.0)]) == pytest.approx(1 - 6 * 2 / (3 * 8))
    assert spearman([(1.0, 9.0), (2.0, 8.0), (3.0, 7.0)]) == pytest.approx(-1.0)
    assert ranks([5.0, 1.0, 5.0]) == [2.5, 1.0, 2.5]
    assert spearman([(1.0, 4.0), (2.0, 4.0)]) == 0.0


def test_regret_is_what_the_choice_costs() -> None:
    assert top1_regret([(10.0, 5.0), (8.0, 6.0), (12.0, 7.0)]) == pytest.approx(0.25)
    assert top1_regret([(8.0, 5.0), (10.0, 6.0)]) == 0.0


SOURCES = {
    "korthikanti": (korthikanti, 9),
    "torchtitan": (torchtitan, 32),
    "tpu_recipes": (tpu_recipes, 25),
    "attached_gpu": (attached_gpu, 2),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_row_is_a_case_or_says_why_not(name: str) -> None:
    make, count = SOURCES[name]
    rows = list(make())
    assert len(rows) == count == len({row.row for row in rows})
    assert [row.row for row in rows if (row.case is None) != bool(row.excluded_because)] == []
    assert {row.source for row in rows} == {name}
    for row in rows:
        if row.case is not None:
            assert load_machine(row.case.machine).chip.compile_as is not None
            assert row.case.machine.startswith(row.chip)


def test_tokens_of_a_step_are_those_that_the_sources_state() -> None:
    """tpu-recipes print tokens; torchtitan's step is global tokens over tokens per second of all GPUs."""
    for row, line in zip(tpu_recipes(), read_table("tpu_recipes"), strict=True):
        if row.case is not None:
            assert row.case.batch * row.case.seq == int(line["global_batch_tokens"]), row.row
            assert row.case.plan.num_devices == int(line["chips_total"])
    for row, line in zip(torchtitan(), read_table("torchtitan"), strict=True):
        if row.case is not None:
            rate = float(line["tokens_per_s_per_gpu"]) * int(line["num_gpus"])
            assert row.case.batch * row.case.seq / rate == pytest.approx(row.measured_step_s, rel=1e-4)
            products = row.case.plan.method.products
            assert products.startswith("fp8") == ("float8" in line["precision"])
            assert products.endswith("rowwise") == ("rowwise" in line["precision"])
            assert (row.in_pieces_over == "tensor") == (line["async_tp"] == "yes")
            assert row.case.plan.num_devices == int(line["num_gpus"])


def test_what_is_excluded_lacks_a_feature() -> None:
    reasons = {row.excluded_because for make, _ in SOURCES.values() for row in make()} - {""}
    assert {reason.split(":")[0].split(" (")[0] for reason in reasons} == {
        "fused attention in ring context parallelism",
        "Llama 4's layers",
        "multi-token prediction, as MaxText trains DeepSeek-V3",
        "no GPU was attached",
    }


@pytest.mark.parametrize(
    ("policy", "names"),
    [
        ("full", None),
        ("qkv_proj_offloaded", ["query", "key", "value"]),
        ("custom: offload decoder_layer_input", ["input"]),
        ("custom: offload decoder_layer_input,out_proj,q,k,v", ["input", "output", "query", "key", "value"]),
        ("custom: offload context, mlpwo (see maxtext_v5p_model_configs.py)", ["attention", "down"]),
        ("custom: offload  ; keep decoder_layer_input ; remat query_proj+key_proj+value_proj", None),
    ],
)
def test_recipes_offload_what_they_say(policy: str, names: list[str] | None) -> None:
    assert remat_of(policy) == ("full" if names is None else {"offload": names})


def test_mistral_has_its_published_size() -> None:
    (row,) = [row for row in tpu_recipes() if "mistral" in row.row]
    assert row.case is not None
    assert num_params(row.case.model) == 7_241_732_096  # mistralai/Mistral-7B-v0.1


@pytest.fixture(scope="module")
def vtrain() -> list[Row]:
    return list(vtrain_single_node())


def test_rows_that_differ_in_layers_microbatches_and_data_ways_share_a_program(vtrain: list[Row]) -> None:
    assert len(vtrain) == 1_440
    assert [row.row for row in vtrain if row.case is None] == []
    programs: dict[str, set[tuple[str, ...]]] = {}
    for row, line in zip(vtrain, read_table("vtrain_single_node"), strict=True):
        assert row.case is not None and row.counts is not None
        stages, data, counts = int(line["pipeline_parallel"]), int(line["data_parallel"]), row.counts
        shared = row.case.plan.axes.get("data", 1)
        assert data == shared if counts.data is None else (data, 2) == (counts.data, shared)
        assert row.case.batch == shared * int(line["micro_batch_seqs"]) * SHARED_MICROBATCHES
        assert row.case.model.layers == SHARED_LAYERS * stages
        assert (KEPT in row.case.plan.flags) == (stages > 1)
        assert counts.microbatches * data * int(line["micro_batch_seqs"]) == int(line["global_batch_seqs"])
        assert (counts.layers * stages, counts.stages) == (int(line["num_layers"]), stages)
        assert load_machine(counts.machine).num_devices == int(line["num_gpus"])
        same = ("hidden_size", "tensor_parallel", "pipeline_parallel", "micro_batch_seqs")
        programs.setdefault(program_key(row.case), set()).add(tuple(line[key] for key in same))
    assert [len(found) for found in programs.values() if len(found) != 1] == []
    # Nine ways to split a model over up to eight GPUs, two widths, four microbatch sizes.
    assert len(programs) == 9 * 2 * 4


def test_figure_1_is_its_formula() -> None:
    outcomes = list(figure_1_outcomes())
    assert len(outcomes) == 16
    assert [row.row for row in outcomes if abs(row.error or 0) > 1e-6] == []
    whole = Layout(model=MODELS["megatron-22b"], tensor=8, stages=1, chunks=1, micro_batch=4, seq=2_048)
    # s b h (10 + 24/8 + 5 64 2048 / (6144 8)) 48 layers, by hand: 59.25 GiB
    assert whole.activation_bytes(selective=False) == pytest.approx(59.25 * GIB)


def test_the_baselines_of_figure_1_are_the_four_models_and_recompute_nothing() -> None:
    rows = list(figure_1_baselines())
    assert [row.row.partition(" ")[0] for row in rows] == ["22B", "175B", "530B", "1T"]
    for row in rows:
        assert row.case is not None
        assert row.case.plan.method.remat == "none"
        assert "norm_seq" not in row.case.plan.activations  # no sequence parallelism


def test_energy_scores_seven_rows_and_names_the_fitted_ones() -> None:
    rows = list(energy_outcomes())
    assert [row.row for row in rows if row.error is not None and abs(row.error) > 0.15] == []
    assert sum(row.error is not None for row in rows) == 7
    assert sum(row.excluded_because.startswith("calibration") for row in rows) == 2


# --- programs that are there --------------------------------------------------------------------------------

LOOP = """\
HloModule step, is_scheduled=true, num_partitions=8

body {
  p = (s32[], bf16[4096,4096]{1,0}) parameter(0)
  i = s32[] get-tuple-element(p), index=0
  x = bf16[4096,4096]{1,0} get-tuple-element(p), index=1
  one = s32[] constant(1)
  next = s32[] add(i, one)
  y = bf16[4096,4096]{1,0} dot(x, x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT out = (s32[], bf16[4096,4096]{1,0}) tuple(next, y)
}

condition {
  p = (s32[], bf16[4096,4096]{1,0}) parameter(0)
  i = s32[] get-tuple-element(p), index=0
  n = s32[] constant(13)
  ROOT less = pred[] compare(i, n), direction=LT
}

ENTRY main {
  x = bf16[4096,4096]{1,0} parameter(0)
  zero = s32[] constant(0)
  init = (s32[], bf16[4096,4096]{1,0}) tuple(zero, x)
  loop = (s32[], bf16[4096,4096]{1,0}) while(init), condition=condition, body=body, \
backend_config={"known_trip_count":{"n":"13"}}
  ROOT y = bf16[4096,4096]{1,0} get-tuple-element(loop), index=1
}
"""


def loop_program(case: Case, **_: object) -> Program:
    axes = dict(case.plan.axes)
    return Program(
        name="step", backend="gpu", hlo_text=LOOP, num_devices=case.plan.num_devices, mesh=axes, compile_s=1.0
    )


def first(make: object, condition: object) -> Row:
    return next(row for row in make() if row.case is not None and condition(row))  # type: ignore[operator]


def test_a_program_is_compiled_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = first(korthikanti, lambda row: row.row == "22B on 8: full")
    assert row.case is not None
    compiled: list[Case] = []

    def compile_case(case: Case, **_: object) -> Program:
        compiled.append(case)
        return loop_program(case)

    monkeypatch.setattr(kept, "compile_case", compile_case)
    assert Programs(tmp_path, 0).find(row.case) is None
    assert Programs(tmp_path, 5).find(row.case, compiling=False) is None
    programs = Programs(tmp_path, 5)
    assert programs.find(row.case) is not None
    assert (programs.compiled, programs.left) == (1, 4)
    assert Programs(tmp_path, 0).find(row.case) is not None
    assert len(compiled) == 1
    monkeypatch.setattr(kept, "program_key", lambda case: "of other sources")
    monkeypatch.setattr("shardlab.lab.cache.program_key", lambda *_: "of other sources")
    assert Programs(tmp_path, 0).find(row.case) is None


def test_what_does_not_compile_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = first(korthikanti, lambda row: row.row == "22B on 8: full")
    assert row.case is not None

    def compile_case(case: Case, **_: object) -> Program:
        raise CompileFailed(case.plan.name, "a bad flag")

    monkeypatch.setattr(kept, "compile_case", compile_case)
    programs = Programs(tmp_path, 5)
    assert programs.why_not(row.case) == "not compiled"
    assert programs.find(row.case) is None
    assert "a bad flag" in programs.why_not(row.case)
    assert programs.find(row.case) is None
    assert programs.left == 4


def test_the_program_prints_and_writes_every_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One compile allowed: one row of korthikanti is predicted, the others say what they lack."""
    monkeypatch.setattr(kept, "compile_case", loop_program)
    out = tmp_path / "rows.csv"
    if not validate.flags.FLAGS.is_parsed():
        validate.flags.FLAGS(sys.argv[:1])
    with flagsaver.flagsaver(
        cache=str(tmp_path),
        csv=str(out),
        sources=["korthikanti"],
        max_compiles=9,
        every_row=True,
        compile_only="22B on 8: full",
    ):
        validate.main(["validate.py"])
    with out.open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == [
        "source", "row", "chip", "measured_step_s", "predicted_step_s", "error_pct", "excluded_because",
    ]  # fmt: skip
    assert len(lines) == 9
    assert [bool(line["predicted_step_s"]) for line in lines] == [True] + [False] * 8
    predicted, measured = float(lines[0]["predicted_step_s"]), float(lines[0]["measured_step_s"])
    assert float(lines[0]["error_pct"]) == pytest.approx(100 * (predicted / measured - 1), abs=0.01)
    assert [line["row"] for line in lines if line["predicted_step_s"] or line["excluded_because"]] == [
        line["row"] for line in lines
    ]
    with (tmp_path / "rows-memory.csv").open(encoding="utf-8") as file:
        memory = list(csv.DictReader(file))
    assert [
        line["row"] for line in memory if not line["predicted_bytes"] and not line["excluded_because"]
    ] == []
    assert sum(line["source"] == "korthikanti figure 1, compiled" for line in memory) == 16
    assert (tmp_path / "rows-energy.csv").exists()
    assert "| korthikanti | 9 | 1 | 0 | 8 |" in capsys.readouterr().out


def test_raw_and_calibrated_steps_stand_side_by_side() -> None:
    """The chip's row is scored raw and gives its efficiency; others are faster or slower by it."""
    row = first(korthikanti, lambda row: row.row == "22B on 8: full")
    other = first(korthikanti, lambda row: row.row == "22B on 8: sequence parallel, selective")
    assert row.case is not None and other.case is not None
    one = analysed(row, loop_program(row.case))
    assert isinstance(one, Analysed)
    line = one.timeline(0.5)
    assert not isinstance(line, str) and line.step_time_s is not None
    at_half = replace(one, row=replace(row, measured_step_s=line.step_time_s))
    known = validate.efficiencies({"a100": at_half})
    assert known == {"a100": pytest.approx(0.5, rel=1e-3)}
    raw, calibrated = validate.steps_of(row, loop_program(row.case), known)
    assert raw.error is not None
    assert calibrated.excluded_because.startswith("calibration")
    raw, calibrated = validate.steps_of(other, loop_program(other.case), known)
    assert raw.predicted is not None
    assert calibrated.predicted == pytest.approx(2 * raw.predicted, rel=0.02)


def test_error_classes_are_the_raw_errors_of_compiled_steps_by_chip(tmp_path: Path) -> None:
    def step(chip: str, predicted: float | None, eager: Eager | None = None) -> Outcome:
        return Outcome(source="s", row="r", chip=chip, measured=10.0, predicted=predicted, eager=eager)

    launched = Eager(predicted_s=1.0, layer_s=1.0, runs=1)
    steps = [*(step("a100", 10.0 + n) for n in range(5)), *(step("v6e", 9.0) for _ in range(4))]
    steps += [step("a100", 99.0, launched), step("a100", None)]
    assert error_class_rows(steps, "2026-01-01") == [("a100", "5", "20.0", "40.0", "s", "2026-01-01")]
    write_error_classes(steps, tmp_path / "errors.csv")
    lines = [line for line in (tmp_path / "errors.csv").read_text().splitlines() if line[0] != "#"]
    assert lines[0] == "chip,rows,mean_error_pct,worst_error_pct,sources,date"
    assert lines[0] in FILE.read_text()


def test_the_efficiency_of_a_chip_makes_its_row_exact_and_scores_it_not() -> None:
    """A step of 3 s of computing and 1 s of waiting takes 5 s at 3/4; outside the bounds there is none."""
    assert efficiency_of(lambda share: 3 / share + 1, 5.0) == pytest.approx(0.75, rel=1e-3)
    assert efficiency_of(lambda share: 3 / share + 1, 100.0) is None
    assert efficiency_of(lambda share: None, 5.0) is None
    rows = [row for make, _ in SOURCES.values() for row in make() if taken_from(row)]
    assert [row.chip for row in rows] == ["a100", "h100-96", "h200", "v6e", "v5p"]
    assert [row.row for row in rows if row.case is None] == []


def test_a_layer_takes_the_longer_of_launching_and_working() -> None:
    step = Eager(predicted_s=1.0, layer_s=2e-3, runs=100)
    assert [step.at(launch_s) for launch_s in (0.0, 2e-3, 5e-3)] == [1.0, 1.0, pytest.approx(1.3)]
    assert step.launch_s(1.3) == pytest.approx(5e-3)
    assert [len(fitted_on(range(count))) for count in (0, 3, 80, 1_440)] == [0, 1, 20, 20]


def test_launching_is_fitted_on_a_few_rows_that_are_not_scored() -> None:
    """Of 5, 5 and 7 ms the middle one errs least; rows whose layers take longer say nothing."""
    bound = Eager(predicted_s=1.0, layer_s=2e-3, runs=100)
    slow = Eager(predicted_s=1.0, layer_s=9e-3, runs=100)
    assert fitted_launch_s([(1.3, bound), (1.3, bound), (1.5, bound), (1.0, slow)]) == pytest.approx(5e-3)
    eager = [
        Outcome(source="e", row=str(n), chip="a100", measured=1.3, predicted=1.0, eager=bound)
        for n in range(8)
    ]
    whole = Outcome(source="w", row="0", chip="a100", measured=1.3, predicted=1.0)
    steps = validate.with_launches([*eager, whole])
    assert [row.predicted is None for row in steps] == [n in (0, 4) for n in range(9)]
    assert steps[0].excluded_because.startswith("calibration")
    assert [row.predicted for row in steps if row.predicted] == [pytest.approx(1.3)] * 6 + [1.0]


def test_efficiency_is_of_the_peak_alone(vtrain: list[Row]) -> None:
    """A product takes twice as long at half the peak, but for its launch; memory keeps its rate."""
    row = next(row for row in vtrain if "TP 4 DP 2" in row.row)
    assert row.case is not None
    one = analysed(replace(row, counts=None), loop_program(row.case))
    assert isinstance(one, Analysed)
    whole, half = (one.timeline(share) for share in (1.0, 0.5))
    assert not isinstance(whole, str) and not isinstance(half, str) and whole.step_time_s is not None
    assert half.step_time_s == pytest.approx(2 * whole.step_time_s, rel=0.02)
    machine = load_machine(row.case.machine)
    assert at_efficiency(machine, 0.5).chip.memory_bytes_per_s == machine.chip.memory_bytes_per_s


def test_tables_count_what_is_missing_and_order_groups() -> None:
    def outcome(measured: float, predicted: float | None, why: str = "") -> Outcome:
        return Outcome(
            source="s",
            row="r",
            chip="a100",
            measured=measured,
            predicted=predicted,
            excluded_because=why,
            group=("g",),
        )

    rows = [
        outcome(10, 5),
        outcome(8, 6),
        outcome(12, 7),
        outcome(1, None, "not compiled"),
        outcome(1, None, "x"),
    ]
    better = [outcome(10, 9), outcome(8, None, "calibration"), *rows[2:]]
    table = list(score_lines(rows, better))
    assert table[2] == (
        "| s | 5 | 3 | 1 | 1 | 38.9 % | -38.9 % | -50.0 % | 0.50 | 2 | 25.8 % | -41.7 % | – |"
    )
    assert list(score_lines(rows, rows))[2].endswith("| 0.50 | | | | |")
    order = list(group_lines(rows, rows))
    assert "| raw | 1 | 0.50 | 0.50 (g) | 25.0 % | 25.0 % (g) |" in order
    assert list(group_lines(rows[:2], rows[:2])) == []
