"""TPU workloads: Google's tpu-recipes for Trillium (v6e) and v5p, trained with MaxText."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from shardlab.spec.models import MODELS, ModelConfig
from validation.row import Row, plan_text, read_table, with_case

TORI = {  # chips of one slice -> its torus; Google Cloud TPU documentation, v6e and v5p topologies
    ("v6e", 8): "2x4",
    ("v6e", 16): "4x4",
    ("v6e", 32): "4x8",
    ("v6e", 64): "8x8",
    ("v6e", 128): "8x16",
    ("v6e", 256): "16x16",
    ("v5p", 128): "4x4x8",
    ("v5p", 512): "8x8x8",
}
NO_MODEL = {
    "deepseek3-671b": "multi-token prediction, as MaxText trains DeepSeek-V3",
    "llama4-17b-128e": "Llama 4's layers (chunked attention, experts in every second layer)",
    "llama4-17b-16e": "Llama 4's layers (chunked attention)",
}
LOSS_PARTS = {"gemma3-12b": 16}  # num_vocab_tiling of its three recipes; the others have none
OFFLOAD_NOTE = "full recomputation on the device; theirs keeps some inputs of products on the host"


def mistral() -> ModelConfig:
    """Mistral 7B, of AI-Hypercomputer/maxtext src/maxtext/configs/models/mistral-7b.yml @e591f30cb."""
    return replace(MODELS["llama3-8b"], name="mistral-7b", vocab=32_000, rope_theta=10_000.0)


def tpu_recipes() -> Iterator[Row]:
    """Every recipe; a row whose layers shardlab does not have is excluded by their name."""
    for number, line in enumerate(read_table("tpu_recipes"), 1):
        chip = "v6e" if "v6e" in line["chip"] else "v5p"
        chips = int(line["chips_total"])
        row = Row(
            source="tpu_recipes",
            row=f"{number}: {line['model']} on {chips} {chip}",
            chip=chip,
            measured_step_s=float(line["step_time_s"]),
        )
        missing = NO_MODEL.get(line["model"], "")
        yield replace(row, excluded_because=missing) if missing else _case(row, line, chips)


def _case(row: Row, line: Mapping[str, str], chips: int) -> Row:
    slices = int(line["num_slices"])
    torus = TORI[row.chip, chips // slices]
    name = line["model"].replace("llama3.1", "llama3")
    model = mistral() if name == "mistral-7b" else MODELS[name]
    dcn_fsdp = int(line["dcn_fsdp"] or 1)
    tensor, expert = int(line["ici_tensor"] or 1), int(line["ici_expert"] or 1)
    inside = chips // slices // tensor // expert
    axes = {"data": slices // dcn_fsdp, "fsdp": inside * dcn_fsdp, "tensor": tensor, "expert": expert}
    method: dict[str, str | int] = {"remat": "full"}
    if "int8" in line["quantization"]:
        method["products"] = "int8"
    if model.num_experts:
        method["experts"] = "dropless"
    if name in LOSS_PARTS:
        method["loss_parts"] = LOSS_PARTS[name]
    text = plan_text(
        f"{row.chip}:{torus}" + (f"*{slices}" if slices > 1 else ""),
        axes,
        batch=("data", "fsdp"),
        sequence_parallel=True,
        method=method,
        # MaxText's fsdp_transpose splits kernels of the MLP along its width, all others along `embed`.
        mlp={"embed": (), "mlp": ("fsdp",)} if line["ici_fsdp_transpose"] == "-1" else None,
    )
    if line["remat_policy"] != "full":
        row = replace(row, notes=(OFFLOAD_NOTE,))
    batch = round(float(line["per_device_batch_seqs"]) * chips)
    return with_case(row, text, model, batch, int(line["seq_len_tokens"]))
