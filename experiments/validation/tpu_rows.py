"""TPU workloads: Google's tpu-recipes for Trillium (v6e) and v5p, trained with MaxText."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from shardlab.spec.models import MODELS, ModelConfig
from shardlab.spec.remat import ACTIVATIONS
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
# num_vocab_tiling, where a recipe has it.
LOSS_PARTS = {("gemma3-12b", "v6e"): 16, ("llama3-405b", "v5p"): 4}
# MaxText's names of activations, as `remat_policy: custom` has them; the reference data shortens three.
NAMES = {theirs: ours for ours, theirs in ACTIVATIONS.items()} | {"q": "query", "k": "key", "v": "value"}
QKV = "query_proj key_proj value_proj"
CAPACITY = "capacity 1.25"  # mixtral_8x7b_dropped and mixtral_8x22b_dropped, which the recipes run
# AI-Hypercomputer/maxtext benchmarks/xla_flags_library.py @e591f30cb: what the recipes' models set (in
# maxtext_trillium_model_configs.py and maxtext_v5p_model_configs.py). They let gathers run beside compute by
# continuation fusion, which libtpu 0.0.50 refuses on anything but v5e; its other way is the SparseCore, which
# takes those over one axis. SparseCore flags for all-reduces changed nothing in the one program that was
# tried (Llama 3.1 8B on eight chips), and are left out.
FLAGS = {
    "gathers beside compute": (
        "--xla_tpu_enable_sparse_core_collective_offload_all_gather=true",
        "--xla_tpu_enable_all_gather_offload_tracing=true",
        "--xla_tpu_use_tc_device_shape_on_sc=true",
        "--xla_sc_enable_instruction_fusion=false",
        "--xla_sc_disjoint_spmem=false",
        "--xla_sc_disable_megacore_partitioning=true",
    ),
    "dense vmem": ("--xla_tpu_scoped_vmem_limit_kib=98304",),
    "gemma vmem": ("--xla_tpu_scoped_vmem_limit_kib=122880",),
    "moe vmem": ("--xla_tpu_scoped_vmem_limit_kib=81920",),
    "data parallel overlap": (
        "--xla_tpu_enable_data_parallel_all_reduce_opt=true",
        "--xla_tpu_data_parallel_opt_different_sized_ops=true",
    ),
    "plain fusion costs": ("--xla_tpu_use_bundle_aware_cost_model_for_fusions=false",),
    "scatter layout": (
        "--xla_tpu_use_minor_sharding_for_major_trivial_input=true",
        "--xla_tpu_relayout_group_size_threshold_for_reduce_scatter=1",
        "--xla_tpu_assign_all_reduce_scatter_layout=true",
    ),
    "host offload": (
        "--xla_tpu_enable_all_experimental_scheduler_features=true",
        "--xla_tpu_enable_scheduler_memory_pressure_tracking=true",
        "--xla_tpu_host_transfer_overlap_limit=24",
        "--xla_tpu_aggressive_opt_barrier_removal=ENABLED",
        "--xla_lhs_prioritize_async_depth_over_stall=ENABLED",
        "--xla_tpu_enable_ag_backward_pipelining=true",
        "--xla_should_allow_loop_variant_parameter_in_chain=ENABLED",
        "--xla_should_add_loop_invariant_op_in_chain=ENABLED",
        "--xla_max_concurrent_host_send_recv=100",
        "--xla_tpu_scheduler_percent_shared_memory_limit=100",
        "--xla_latency_hiding_scheduler_rerun=2",
    ),
    "no collective matmul": ("--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000",),
}
WITHOUT_COLLECTIVE_MATMUL = {
    ("llama3.1-8b", "8"),
    ("llama3.1-8b", "16"),
    ("llama3.1-8b", "32"),
    ("llama3.1-70b", "32"),
    ("mistral-7b", "8"),
}


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
    # Every recipe sets use_iota_embed, GPT-3's in the model's own file.
    method: dict[str, object] = {"remat": remat_of(line["remat_policy"]), "lookup": "one-hot"}
    if "int8" in line["quantization"]:
        method["products"] = "int8"
    if model.num_experts:
        method["experts"] = CAPACITY
    if line["weight_dtype"] == "bfloat16":
        method["state"] = "bf16"
    if (name, row.chip) in LOSS_PARTS:
        method["loss_parts"] = LOSS_PARTS[name, row.chip]
    text = plan_text(
        f"{row.chip}:{torus}" + (f"*{slices}" if slices > 1 else ""),
        axes,
        batch=("data", "fsdp"),
        sequence_parallel=True,
        method=method,
        blocks=_blocks(line, expert),
        flags=flags_of(row, line),
    )
    batch = round(float(line["per_device_batch_seqs"]) * chips)
    return with_case(row, text, model, batch, int(line["seq_len_tokens"]))


def remat_of(policy: str) -> str | dict[str, list[str]]:
    """MaxText's `remat_policy` in our names; what it keeps on the device is the layer's input, as we do."""
    offloaded = QKV if policy == "qkv_proj_offloaded" else policy.partition("offload")[2].partition(";")[0]
    words = re.findall(r"\w+", offloaded.partition("(")[0])
    return {"offload": [NAMES[word] for word in words if word in NAMES]} if words else "full"


def _blocks(line: Mapping[str, str], expert: int) -> dict[str, dict[str, list[str]]]:
    """Where parameters lie otherwise than `embed` over fsdp (`logical_axis_rules` of MaxText's base.yml):
    `fsdp_transpose` splits `mlp` where a weight has it, and what is no expert's lies over its axis too."""
    if line["ici_fsdp_transpose"]:
        return {"mlp": {"embed": [], "mlp": ["fsdp"]}}
    return {"attention": {"embed": ["fsdp", "expert"]}} if expert > 1 else {}


def flags_of(row: Row, line: Mapping[str, str]) -> tuple[str, ...]:
    """The recipe's compiler flags (`FLAGS`)."""
    model = line["model"]
    sets: tuple[str, ...] = ("dense vmem", "gathers beside compute")
    if model == "gemma3-12b":
        sets = ("gemma vmem",)
    elif row.chip == "v5p":
        # The rest of GPT-3's script suited the compiler of 2023; with it this one's step is twice as long.
        sets = sets[1:] if model == "gpt3-175b" else (*sets, "host offload")
    elif model == "gpt3-175b":
        sets = (*sets, "data parallel overlap", "plain fusion costs")
    elif model.startswith("mixtral"):
        sets = ("moe vmem", "gathers beside compute", "data parallel overlap")
    elif model == "llama3.1-405b":
        sets = (*sets, "host offload")
    elif model != "llama2-70b":
        sets = (*sets, "host offload", "scatter layout", "data parallel overlap")
    if (model, line["chips_total"]) in WITHOUT_COLLECTIVE_MATMUL:
        sets = (*sets, "no collective matmul")
    return tuple(flag for name in sets for flag in FLAGS[name])
