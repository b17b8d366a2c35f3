"""Memory: figure 1 of arXiv:2205.05198 as a closed form, and what PyTorch's allocator reserves beside what is
alive in our program; per GPU."""

from __future__ import annotations

from dataclasses import dataclass

from shardlab.analysis import attribute
from shardlab.attribute.origin import phase_of
from shardlab.cost.liveness import peaks_by_computation
from shardlab.hardware.machine import Machine
from shardlab.hlo.attributes import metadata
from shardlab.program import Program
from shardlab.spec.case import Case
from shardlab.spec.models import ModelConfig
from shardlab.spec.params import ParamSpec
from shardlab.spec.sharding import num_ways

# Adam with 16-bit weights: weights 2, gradients 4, f32 copy 4, two moments 8.
STATE_BYTES = 18


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Of one of Megatron's runs; chunks: of layers on a stage, 1 without interleaving."""

    model: ModelConfig
    tensor: int
    stages: int
    chunks: int
    micro_batch: int
    seq: int

    @property
    def state_bytes(self) -> float:
        """Of the layers alone, 12 layers embed^2 parameters (section 6), as the figure counts."""
        parameters = 12 * self.model.layers * self.model.embed**2
        return STATE_BYTES * parameters / (self.tensor * self.stages)

    def activation_bytes(self, *, selective: bool) -> float:
        """Of the first stage; selective: sequence parallel, attention recomputed (table 2 of the paper)."""
        s, h, t = self.seq, self.model.embed, self.tensor
        scores = 5 * self.model.heads * s / h
        layer = s * self.micro_batch * h * (34 / t if selective else 10 + 24 / t + scores / t)
        waiting = 1 + (self.stages - 1) / (self.stages * self.chunks) if self.chunks > 1 else 1.0
        return layer * self.model.layers * waiting


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserved:
    """What PyTorch's caching allocator reserves of a step instead of some of what our program holds.

    instead_of: owners of our program's memory (`Owners.by_owner`); size_bytes in their place. layer: whether
    what a layer's forward pass needs for a moment comes on top (`layer_temporaries`). torchtitan prints what
    is reserved at most (`reserved_bytes.all.peak`, torchtitan/metrics.py @9dec370).
    """

    instead_of: tuple[str, ...]
    size_bytes: int
    layer: bool


def reserved_with_fsdp2(case: Case, *, eager_layers: bool, eager_loss: bool) -> Reserved:
    """When the loss goes backward. Parameters, optimizer and what is kept for the backward pass are those of
    our program. eager_layers, eager_loss: which of them were not compiled."""
    root, head, layer = _gathered(case)
    # What one stream frees serves no other: of gathers, and of reduce-scatters the f32 shards of gradients.
    streams = root + layer + sum(4 * _held(case, spec) for spec in case.parameters())
    # A loss that runs operation by operation still holds the head in our program too: it is kept there.
    copies = root + layer - (head if eager_loss else 0)
    size = streams + copies + _loss_blocks(case, eager_loss)
    if _ways(case, "vocab") > 1:  # what enters the head, gathered: its product keeps it
        size += 2 * _tokens(case) * case.model.embed
    if eager_layers:
        size += _kept_unread(case)
    replaced = ("gradients", "collectives", "temporaries")
    return Reserved(instead_of=replaced, size_bytes=round(size), layer=True)


def reserved_by_a_stage(case: Case, fsdp: int) -> Reserved:
    """Of a pipeline, whose stages shard their f32 parameters over `fsdp` devices and keep them gathered in 8
    bits for a step (torchtitan/parallelisms/parallelize_llama.py @9dec370, `apply_fsdp`: "For PP, do not
    reshard after forward"). Ours holds them whole in f32, as ZeRO-1. Gradients are added up whole in both;
    theirs has the reduced shards beside them, on another stream, and a layer on that of gathers."""
    held = {spec.path: _held(case, spec) for spec in case.parameters()}
    layers = sum(size for path, size in held.items() if path.startswith("layers/"))
    stage = layers + held["head/kernel"]  # or the embedding: as large, on the first
    layer = layers * num_ways(case.plan.params["stage"], case.plan.axes) / case.model.layers
    size = stage * (4 / fsdp + 1 + 4 / fsdp) + layer
    return Reserved(instead_of=("parameters",), size_bytes=round(size), layer=False)


def _gathered(case: Case) -> tuple[float, float, float]:
    """Bytes of the root unit (embedding, final norm and head), of the head in it, and of a layer, gathered.

    These are the two largest units that are gathered one after the other on a stream of their own, and
    copied out into arrays of the stream of compute (pytorch/pytorch
    torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py, `foreach_all_gather`,
    `foreach_all_gather_copy_out`). There the root's stay, and when the loss goes backward the last layer's
    (torchtitan/parallelisms/parallelize_llama.py @9dec370, `apply_fsdp`).
    """
    table = case.parameters()
    layers = [spec for spec in table if spec.path.startswith("layers/")]
    layer_bytes = 1 if case.plan.method.products == "fp8" else 2
    root = {spec.path: 2 * _held(case, spec, "fsdp") for spec in table if spec not in layers}
    layer = layer_bytes * sum(_held(case, spec, "fsdp") for spec in layers) / case.model.layers
    return sum(root.values()), root["head/kernel"], layer


def _held(case: Case, spec: ParamSpec, without: str = "") -> float:
    """Elements of a parameter on one device, gathered over the axis `without`."""
    plan = case.plan
    names = (name for axis in spec.axes if axis for name in plan.params.get(axis, ()) if name != without)
    return spec.size / num_ways(names, plan.axes)


def _loss_blocks(case: Case, eager: bool) -> float:
    """Of the arrays of logits' size.

    Compiled, the gradient of the 16-bit logits, which are kept (torchtitan/components/loss.py). Operation by
    operation, the arrays in f32 and what is left between them: the allocator splits a free block and never
    moves one (c10/cuda/CUDACachingAllocator.cpp, best fit). Forward there are logits in 16 bits, in f32, and
    log-probabilities; then the first two are free, backward one f32 array fits there, a half is left that
    nothing of this size can use, and a third is new: 3.5. Where the vocabulary is split, DTensor's own loss
    has one more each way (torch/distributed/tensor/parallel/loss.py: `shifted` in `_log_softmax`, the sum
    beside its product in `_nll_loss_and_log_softmax_backward`): 4.5.
    """
    split = _ways(case, "vocab")
    f32_bytes = 4 * _tokens(case) * case.model.vocab / split
    if not eager:
        return f32_bytes / 2
    return f32_bytes * (4.5 if split > 1 else 3.5)


def _kept_unread(case: Case) -> float:
    """The last product of each layer: the seventh, of which selective checkpointing keeps every second one,
    and which nothing reads again. A compiler drops it; the eager mode keeps what the policy says
    (`_apply_ac_to_transformer_block`; `_CachingTorchDispatchMode` of torch/utils/checkpoint.py).
    """
    return 2 * _tokens(case) * case.model.embed * case.model.layers


def _ways(case: Case, axis: str) -> int:
    return num_ways(case.plan.activations.get(axis, ()), case.plan.axes)


def _tokens(case: Case) -> float:
    """On one device, or on each of those that share a sequence."""
    return case.batch * case.seq / _ways(case, "batch")


def layer_temporaries(program: Program, machine: Machine) -> int | None:
    """Bytes that a turn of the forward loop over layers has beside what it keeps, at most: blocks of less
    than the loss's arrays, so that those can use none of them. None where there is no such loop."""
    (part,) = attribute(program, machine=machine)
    peaks = peaks_by_computation(part.module, part.graph, program.backend)
    turns = [
        peaks[site.callee].total_bytes
        for site in part.graph.sites.by_caller[part.module.entry]
        if peaks is not None and site.role == "body"
        if phase_of(metadata(site.instruction).op_name, training=True)[0] == "forward"
    ]
    return max(turns, default=None)
