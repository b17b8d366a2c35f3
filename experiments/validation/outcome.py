"""What became of a row: predicted beside measured, or why not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from shardlab.case_report import CaseReport, report_case
from shardlab.cost.energy import step_energy
from shardlab.cost.flops import model_flops
from shardlab.cost.memory import memory_report
from shardlab.cost.timeline import Timeline
from shardlab.hardware.catalog import load_machine
from shardlab.hardware.data_files import load_chip
from shardlab.hardware.measured import MeasuredPower, node_powers
from shardlab.program import Program
from shardlab.spec.models import MODELS
from shardlab.units import format_bytes
from validation.efficiency import Eager
from validation.memory import Layout, layer_temporaries
from validation.row import Row, read_table

NOT_COMPILED = "not compiled"
GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """measured, predicted: seconds, bytes or joules, by the table that it stands in. A row without a
    prediction is excluded (`excluded_because`), or has none yet, which begins with `NOT_COMPILED`. eager: of
    a step whose kernels were launched one by one.
    """

    source: str
    row: str
    chip: str
    measured: float | None
    predicted: float | None = None
    excluded_because: str = ""
    eager: Eager | None = None
    group: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def error(self) -> float | None:
        """predicted / measured - 1."""
        if self.predicted is None or self.measured is None:
            return None
        return self.predicted / self.measured - 1

    @property
    def waiting(self) -> bool:
        """No program yet: neither scored nor excluded."""
        return self.excluded_because.startswith(NOT_COMPILED)


def step_outcome(row: Row, answer: Timeline | str) -> Outcome:
    """The step time. answer: the timeline of the row's program, or why there is none."""
    if isinstance(answer, str):
        return _outcome(row, row.measured_step_s, None, answer)
    outcome = _outcome(row, row.measured_step_s, answer.step_time_s, "")
    return replace(outcome, eager=_eager(row, answer))


def _eager(row: Row, line: Timeline) -> Eager | None:
    """None of a step that was compiled, too. The critical path has a layer's time as often as the last device
    works on it, without the bubble."""
    if row.counts is None or line.step_time_s is None:
        return None
    layers_s = sum(entry.time_s for entry in line.critical_path if entry.layer.startswith("layers"))
    counts = row.counts
    return Eager(
        predicted_s=line.step_time_s,
        layer_s=layers_s / (counts.layers * counts.microbatches),
        runs=counts.layers * (counts.microbatches + counts.stages - 1),
    )


def memory_outcome(row: Row, answer: Program | str) -> Outcome:
    """The peak memory of one device, parameters and optimizer included. answer: the row's program, or why
    there is none."""
    if isinstance(answer, str) or row.case is None:
        return _outcome(row, row.measured_bytes, None, str(answer))
    machine = load_machine(row.case.machine)
    fit = memory_report(answer.memory, answer.refusal, machine)
    if fit.needed_bytes is None:
        return _outcome(row, row.measured_bytes, None, "no memory analysis")
    needed = float(fit.needed_bytes)
    if row.reserved is not None:
        owners = report_case(row.case, answer, machine).owners
        assert owners is not None  # as of every program with a memory analysis and an order
        replaced = row.reserved.instead_of
        needed = float(sum(size for name, size in owners.by_owner.items() if name not in replaced))
        needed += row.reserved.size_bytes
        needed += (layer_temporaries(answer, machine) or 0) if row.reserved.layer else 0
    return _outcome(row, row.measured_bytes, needed, "")


def verdict_line(row: Row, answer: Program | str) -> str:
    """Whether a row's program fits on its machine, with the sizes."""
    if isinstance(answer, str) or row.case is None:
        return f"{row.row}: {answer}"
    fit = memory_report(answer.memory, answer.refusal, load_machine(row.case.machine))
    sizes = (None if size is None else format_bytes(size) for size in (fit.needed_bytes, fit.limit_bytes))
    return f"{row.row}: fits {fit.fits}, {' of '.join(size or 'unknown' for size in sizes)}"


def _outcome(row: Row, measured: float | None, predicted: float | None, why: str) -> Outcome:
    return Outcome(
        source=row.source,
        row=row.row,
        chip=row.chip,
        measured=measured,
        predicted=predicted,
        excluded_because=why,
        group=row.group,
        notes=row.notes,
    )


# --- figure 1 of Korthikanti et al. -----------------------------------------------------------------------


def figure_1_outcomes() -> Iterator[Outcome]:
    """The paper's formula, reproduced: states and activations of each bar."""
    runs = {line["model"]: line for line in read_table("korthikanti")}
    for line in read_table("korthikanti_fig1"):
        run, selective = runs[line["model"]], "selective" in line["method"]
        layout = Layout(
            model=MODELS[f"megatron-{line['model'].lower()}"],
            tensor=int(run["tensor_parallel"]),
            stages=int(run["pipeline_parallel"]),
            chunks=int(run["interleave_stages"]),
            micro_batch=int(run["micro_batch_seqs"]),
            seq=int(run["seq_len_tokens"]),
        )
        for what, published, formula in (
            ("states", line["published_params_grads_optimizer_gib"], layout.state_bytes),
            ("activations", line["published_activations_gib"], layout.activation_bytes(selective=selective)),
        ):
            yield Outcome(
                source="korthikanti figure 1, closed form",
                row=f"{line['model']} {'sequence parallel, selective' if selective else 'baseline'}, {what}",
                chip="a100",
                measured=float(published) * GIB,
                predicted=formula,
            )


def figure_1_compiled(row: Row, answer: CaseReport | str) -> Iterator[Outcome]:
    """The compiled program beside the formula. It differs where XLA does: weights are f32 (12 bytes with
    Adam, no 16-bit copy between steps), gradients f32, scores f32, and what is kept of a layer is what JAX
    keeps."""
    published = {
        "states": "published_params_grads_optimizer_gib",
        "activations": "published_activations_gib",
    }
    owners = {"states": ("parameters", "optimizer", "gradients"), "activations": ("activations",)}
    model, _, method = row.row.partition(" ")
    (line,) = [
        line
        for line in read_table("korthikanti_fig1")
        if line["model"] == model and line["method"].startswith(method.split(",")[0])
    ]
    for what, column in published.items():
        predicted, why = None, answer if isinstance(answer, str) else ""
        if isinstance(answer, CaseReport) and answer.owners is not None:
            held = answer.owners.by_owner
            predicted = float(sum(held.get(owner, 0) for owner in owners[what]))
        outcome = _outcome(row, float(line[column]) * GIB, predicted, why)
        yield replace(outcome, row=f"{row.row}, {what}")


# --- energy -----------------------------------------------------------------------------------------------

COOLED = {"immersion": "hgx-h100-immersion", "air": "h100"}


def energy_outcomes() -> Iterator[Outcome]:
    """Joules per step of the MLPerf rows, at their own step time."""
    for row in node_powers():
        outcome = Outcome(
            source="mlperf_power",
            row=f"{row.system}, {row.workload}",
            chip=row.chip,
            measured=row.node_power_w * row.nodes * row.step_time_s,
        )
        yield _energy(row, outcome)


def _energy(row: MeasuredPower, outcome: Outcome) -> Outcome:
    if row.scored != "scored":
        why = {"fitted": "calibration: the power of idle and busy nodes is fitted on it"}
        return replace(outcome, excluded_because=why.get(row.scored, f"no power figures for {row.chip}"))
    machine = load_machine(f"{COOLED[row.cooling]}:{row.nodes}x8")
    peak = 2 * (load_chip(row.chip).bf16_flops_per_s or 0)  # they train in fp8
    busy = training_flops(row) / row.accelerators / row.step_time_s / peak
    energy = step_energy(machine, row.step_time_s, busy, row.batch * row.seq)
    return replace(outcome, predicted=energy.energy_j)


def training_flops(row: MeasuredPower) -> float:
    """GPT-3 trains every weight. LoRA's base weights are frozen: their products run forward and for the
    gradient of their inputs, two of the three times; attention has no weights and runs all three."""
    if row.workload == "gpt3":
        return model_flops(MODELS["gpt3-175b"], row.batch, row.seq, "train")
    config = MODELS["llama2-70b"]
    whole = model_flops(config, row.batch, row.seq, "train")
    # Causal: half of the pairs; scores and values, 2 FLOPs a pair and dimension each, three times.
    attention = 6 * config.layers * config.heads * config.head_dim * row.seq**2 * row.batch
    return (whole - attention) * 2 / 3 + attention
