"""Memory: figure 1 of arXiv:2205.05198 as a closed form, and what PyTorch reserves beside its compute stream;
per GPU."""

from __future__ import annotations

from dataclasses import dataclass

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


def fsdp2_pool_bytes(case: Case) -> int:
    """What the caching allocator reserves for the streams of FSDP2's collectives.

    What one stream frees serves no other, so that a process reserves the sum of each stream's peak, which is
    what torchtitan prints (`reserved_bytes.all.peak`, torchtitan/metrics.py @9dec370). On the stream of
    reduce-scatters lie the f32 shards of all gradients, on that of all-gathers the two largest arrays that
    are gathered one after the other: embedding, final norm and head, which are one unit, and a layer
    (pytorch/pytorch torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py, `foreach_all_gather`,
    `foreach_reduce`; torchtitan/parallelisms/parallelize_llama.py @9dec370, `apply_fsdp`).
    """
    plan, table = case.plan, case.parameters()

    def held(spec: ParamSpec, without: str = "") -> float:
        names = (name for axis in spec.axes if axis for name in plan.params.get(axis, ()) if name != without)
        return spec.size / num_ways(names, plan.axes)

    layers = [spec for spec in table if spec.path.startswith("layers/")]
    outer = [spec for spec in table if spec not in layers]
    layer_bytes = 1 if plan.method.products == "fp8" else 2
    gradients = sum(4 * held(spec) for spec in table)
    gathered = 2 * sum(held(spec, "fsdp") for spec in outer)
    one_layer = layer_bytes * sum(held(spec, "fsdp") for spec in layers) / case.model.layers
    return round(gradients + gathered + one_layer)
