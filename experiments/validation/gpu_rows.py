"""GPU workloads: Korthikanti's A100 runs, torchtitan's H100 and H200 runs, vTrain's single A100 node."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from shardlab.cost.compute_time import UNFUSED
from shardlab.spec.models import MODELS, ModelConfig
from validation.data_ways import SHARED_DATA
from validation.memory import reserved_by_a_stage, reserved_with_fsdp2
from validation.row import Row, plan_text, read_table, with_case
from validation.substitution import SHARED_LAYERS, SHARED_MICROBATCHES, Counts

GIB = 1 << 30
# Named features that shardlab lacks; a row that needs one is not scored.
ONE_HOST = "stages of more than one host: of figure 1, only 22B is compiled"
FUSED_CONTEXT_PARALLEL = "fused attention in ring context parallelism: ours attends blockwise, unfused"
# Megatron reduces in the backward pass while it finds the weights' gradients
# (`LinearWithGradAccumulationAndAsyncCommunication` of NVIDIA/Megatron-LM): of arXiv:2205.05198, table 4, a
# layer's backward pass is no longer than its products, attention and norms.
OVERLAP = "--xla_gpu_enable_latency_hiding_scheduler=true"
# The program that rows share has other layers and microbatches than they, and where it keeps more than the
# chip holds XLA would find products again, which no run did.
KEPT = "--xla_disable_hlo_passes=rematerialization"
FREE_STAGES = "each stage is priced as a program of its own, as theirs are: none waits at ticks"
# What scaled_dot_product_attention dispatches to on H100 unless told otherwise: pytorch/torchtitan#1042.
PYTORCH_ATTENTION = "flash-attention-2"
# Of December 2024, when the loss was not compiled: train.py of pytorch/torchtitan @9dec370 ("compiling loss
# function causes CUDA errors, turning off for now").
TABLES_OF_2024 = ("1", "2", "3", "4", "5", "6")
# parallelize_llama.py of pytorch/torchtitan @9dec370, `apply_fsdp`: "For PP, do not reshard after forward".
GATHERED_FOR_A_STEP = "ZeRO-1: weights are whole on a stage; theirs while a step runs, in 8 bits"
# Selective checkpointing by operator, `_save_list` of torchtitan/parallelisms/parallelize_llama.py @9dec370:
# attention, every second product of query, key, value, output, gate, up, down, and what is reduce-scattered.
EVERY_SECOND_PRODUCT = ["query", "value", "attention", "gate"]
SCATTERED = ["output"]


def korthikanti(attention: str = "auto") -> Iterator[Row]:
    """Tables 3 and 5 and section 6.3 of arXiv:2205.05198: Megatron's GPTs on DGX A100. attention: as in
    `[method]`."""
    for line in read_table("korthikanti"):
        tensor, stages, data = (int(line[f"{name}_parallel"]) for name in ("tensor", "pipeline", "data"))
        batch, micro = int(line["global_batch_seqs"]), int(line["micro_batch_seqs"])
        selective = "selective" in line["method"]
        what = "sequence parallel, selective" if selective else "full"
        row = Row(
            source="korthikanti",
            row=f"{line['model']} on {line['num_gpus']}: {what}",
            chip="a100",
            measured_step_s=float(line["iteration_time_s"]),
            attention_kernel=UNFUSED,
        )  # fmt: skip
        # cuDNN's calls stand for Megatron's kernels in the price; wider heads than theirs are unfused.
        wide = int(line["hidden_size"]) // int(line["attention_heads"]) > 128
        kernel = "unfused" if wide else attention
        method: dict[str, str | int] = {"remat": "selective" if selective else "full", "attention": kernel}
        if stages > 1:
            chunks = int(line["interleave_stages"])
            method |= {"pipeline": "1f1b", "microbatches": batch // (data * micro)}
            if chunks > 1:
                method |= {"pipeline": "interleaved", "virtual_stages": chunks}
            method["scan_layers"] = False  # their layers have weights and gradients of their own, no stacks
            row = replace(row, free_stages=True, notes=(*row.notes, FREE_STAGES))
        text = plan_text(
            f"a100:{int(line['num_gpus']) // 8}x8",
            {"data": data, "stage": stages, "tensor": tensor},
            batch=("data",),
            sequence_parallel=selective,
            split_hops=True,
            method=method,
            flags=(OVERLAP,),
        )
        model, seq = f"megatron-{line['model'].lower()}", int(line["seq_len_tokens"])
        yield with_case(row, text, model, batch, seq)


def figure_1_rows(attention: str = "auto") -> Iterator[Row]:
    """The bars of figure 1; a program can stand beside 22B on one host, with and without recomputation."""
    for line in read_table("korthikanti_fig1"):
        selective = "selective" in line["method"]
        row = Row(
            source="korthikanti figure 1, compiled",
            row=f"{line['model']} {'sequence parallel, selective' if selective else 'baseline'}",
            chip="a100",
            measured_step_s=None,
        )
        if line["model"] != "22B":
            yield replace(row, excluded_because=ONE_HOST)
            continue
        method = {"remat": "selective" if selective else "none", "attention": attention}
        text = plan_text("a100:1x8", {"tensor": 8}, sequence_parallel=selective, method=method)
        yield with_case(row, text, "megatron-22b", 4, 2_048)


def figure_1_baselines() -> Iterator[Row]:
    """The four baselines of figure 1 (tensor parallelism alone, nothing recomputed), each on the chips of its
    run, the larger three as its pipeline: none of them fits."""
    yield next(row for row in figure_1_rows() if row.case is not None)
    for row in korthikanti():
        model = row.row.partition(" ")[0]
        if row.case is None or model == "22B" or "full" not in row.row or "2240" in row.row:
            continue
        plan = row.case.plan
        kept = plan.model_copy(update={"method": plan.method.model_copy(update={"remat": "none"})})
        yield replace(row, row=f"{model} baseline", case=row.case.model_copy(update={"plan": kept}))


def attached_gpu() -> Iterator[Row]:
    """What `shardlab` would measure itself, if a GPU were attached."""
    for what in ("GPT-2 124M", "a layer of Llama 3 8B"):
        yield Row(
            source="attached_gpu",
            row=f"{what} on one GPU",
            chip="",
            measured_step_s=None,
            excluded_because="no GPU was attached: nothing measured",
        )


def torchtitan() -> Iterator[Row]:
    """Llama 3.1 with FSDP, tensor, pipeline and context parallelism; tokens/s and peak memory."""
    for number, line in enumerate(read_table("torchtitan"), 1):
        chip = "h200" if line["gpu"].startswith("H200") else "h100-96"
        memory = float(line["memory_gib"]) * GIB if line["memory_gib"] else None
        degrees = (("TP", "tensor_parallel"), ("CP", "context_parallel"), ("PP", "pipeline_parallel"))
        traits = [f"FSDP {line['fsdp']}"]
        traits += [f"{name} {line[key]}" for name, key in degrees if line[key] != "1"]
        traits += [line["precision"], f"{int(line['seq_len_tokens']):,} tokens"]
        traits += ["eager"] if line["torch_compile"] == "no" else []
        traits += ["async TP"] if line["async_tp"] == "yes" else []
        row = Row(
            source="torchtitan",
            row=f"{number}: {line['model']}, {', '.join(traits)}",
            chip=chip,
            measured_step_s=float(line["derived_step_time_s"]),
            measured_bytes=memory,
            attention_kernel=PYTORCH_ATTENTION,
            in_pieces_over="tensor" if line["async_tp"] == "yes" else None,
        )
        if line["context_parallel"] != "1":
            yield replace(row, excluded_because=FUSED_CONTEXT_PARALLEL)
        else:
            yield _torchtitan_case(row, line)


def _torchtitan_case(row: Row, line: Mapping[str, str]) -> Row:
    method: dict[str, object] = {"remat": "full"}
    notes = []
    if line["activation_checkpointing"] != "full":
        scattered = SCATTERED if line["tensor_parallel"] != "1" else []
        method["remat"] = {"keep": EVERY_SECOND_PRODUCT + scattered}
    if "float8" in line["precision"]:
        method["products"] = "fp8-rowwise" if "rowwise" in line["precision"] else "fp8"
    eager = line["torch_compile"] == "no"
    eager_loss = eager or line["table"] in TABLES_OF_2024
    if eager_loss:
        method["loss"] = "unfused"
    if eager:
        notes.append("compiled and fused; theirs ran eagerly")
    stages = int(line["pipeline_parallel"])
    if stages > 1:  # as many microbatches as stages, torchtitan's default
        notes += [GATHERED_FOR_A_STEP, FREE_STAGES]
        row = replace(row, free_stages=True)
        method |= {"pipeline": "1f1b", "microbatches": stages}
        if line["pipeline_schedule"] != "1F1B":  # two chunks of layers a stage, its default too
            method |= {"pipeline": "interleaved", "virtual_stages": 2}
    model = MODELS["llama3-" + line["model"].rpartition(" ")[2].lower()]
    seq = int(line["seq_len_tokens"])
    text = plan_text(
        f"{row.chip}:{int(line['num_gpus']) // 8}x8",
        {"fsdp": int(line["fsdp"]), "stage": stages, "tensor": int(line["tensor_parallel"])},
        fsdp=() if stages > 1 else ("fsdp",),
        zero1=("fsdp",) if stages > 1 else (),
        sequence_parallel=True,
        method=method,
    )
    model = replace(model, context=max(seq, model.context))
    row = with_case(replace(row, notes=tuple(notes)), text, model, int(line["global_batch_seqs"]), seq)
    if row.case is None:
        return row
    if stages > 1:
        return replace(row, reserved=reserved_by_a_stage(row.case, int(line["fsdp"])))
    reserved = reserved_with_fsdp2(row.case, eager_layers=eager, eager_loss=eager_loss)
    return replace(row, reserved=reserved)


def vtrain_single_node(attention: str = "auto") -> Iterator[Row]:
    """GPTs on up to eight A100, eager Megatron: 1F1B, gradients reduced at the end.

    Nothing is recomputed in the time that counts, though all say `use_checkpoint`: the last stage, which goes
    backward as soon as it went forward, does not (VIA-Research/vTrain `src/predictor.py` @f8dda84, "Last rank
    worker dosen't perform recomputation"), nor does a run of one stage; the others do it while they wait for
    a gradient, on which it does not depend there. The times agree: without stages, from 1,024 to 2,048 of
    width a layer of 8 sequences takes 8.9 ms longer, for 618 GFLOP of projections forward. With backward and
    recomputation that were 278 TFLOP/s, and no product reaches more than 271 (`gemm.csv`); and of two stages
    each further layer adds to filling and draining what it takes forward and backward once, and no more.
    Gradients have 16 bits, as parameters (`predictor.py`: what is reduced is their `element_size`).

    Rows that differ only in their layers, microbatches and ways of data parallelism share a program.
    """
    for line in read_table("vtrain_single_node"):
        gpus, batch, micro = (int(line[k]) for k in ("num_gpus", "global_batch_seqs", "micro_batch_seqs"))
        tensor, data, stages = (int(line[f"{name}_parallel"]) for name in ("tensor", "data", "pipeline"))
        width, layers = int(line["hidden_size"]), int(line["num_layers"])
        count = batch // (data * micro)
        split = f"TP {tensor} DP {data} PP {stages}"
        # Eight GPUs at most: those that are full without data parallelism have none.
        shared = SHARED_DATA if tensor * stages < 8 else 1
        method: dict[str, str | int] = {
            "remat": "none", "attention": attention, "gradient_sums": "bf16", "loss": "unfused",
        }  # fmt: skip
        if stages > 1:
            method |= {"pipeline": "1f1b", "microbatches": SHARED_MICROBATCHES}
        else:
            method["accumulate"] = SHARED_MICROBATCHES
        row = Row(
            source="vtrain_single_node",
            row=f"{line['config']}: {layers} layers of {width}, {split}, {count} x {micro}",
            chip="a100",
            measured_step_s=float(line["iteration_time_ms"]) / 1e3,
            group=(f"{gpus} GPUs", f"batch {batch}", f"{layers} layers of {width}"),
            attention_kernel=UNFUSED,
            counts=Counts(
                layers=layers // stages,
                microbatches=count,
                stages=stages,
                data=data if shared > 1 else None,
                machine=f"a100:1x{gpus}",
            ),
        )  # fmt: skip
        text = plan_text(
            f"a100:1x{shared * stages * tensor}",
            {"data": shared, "stage": stages, "tensor": tensor},
            batch=("data",),
            method=method,
            flags=(KEPT,) if stages > 1 else (),
        )
        model = _vtrain_model(width, SHARED_LAYERS * stages)
        yield with_case(row, text, model, shared * micro * SHARED_MICROBATCHES, 1_024)


def _vtrain_model(width: int, layers: int) -> ModelConfig:
    """Megatron's GPT with 16 heads; its default vocabulary of 50,257 is padded to 51,200 for tensor
    parallelism (a multiple of 128 on each of eight devices)."""
    return replace(
        MODELS["megatron-22b"],
        name=f"vtrain-{width}x{layers}",
        layers=layers,
        embed=width,
        heads=16,
        kv_heads=16,
        head_dim=width // 16,
        mlp=4 * width,
        context=1_024,
    )
