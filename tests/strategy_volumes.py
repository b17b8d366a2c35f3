"""What one device sends in a training step, per mesh axis and kind of collective: closed forms.

Of the strategies of data and tensor parallelism, as the literature gives them, with bandwidth-optimal
algorithms (DESIGN section 3). Sizes are what the other axes leave a device. Nothing here reads a program.

Which tests hold which strategy's bytes to a closed form (c: CPU, g: GPU, t: TPU):
- data parallel, ZeRO-1, ZeRO-2, FSDP, HSDP, tensor and vocabulary parallelism, 2-D tensor and sequence
  parallelism: parallel/test_volumes.py c g t (`SummedWhole`: what a TPU does otherwise). FSDP and tensor
  parallelism of large models: test_literature_volumes.py g t.
- context parallelism, all-gather, ring, Ulysses and ring x Ulysses: test_context_volumes.py c g t.
- pipelines, GPipe, 1F1B, interleaved and ZB-H1: test_pipeline_volumes.py c g t (published_schedules.py has
  the schedules), beside ZeRO-1 c g t, beside tensor parallelism g.
- context parallelism and experts inside a pipeline: test_meeting_volumes.py c g t.
- experts: parallel/test_experts.py, capacity c g t; dropless c, and g t as upper bounds.
- serving: parallel/test_serving_volumes.py, decoding c g t, context parallel prefill c.
- fp8 products under FSDP g t and sequence parallelism g, and a TPU's scatters through windows:
  test_training_volumes.py.
- what may not appear: test_forbidden.py, one table, c g t.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction

F32 = 4
Volumes = dict[tuple[str, str], Fraction]  # (axes joined with +, kind) -> bytes


def all_reduce(ways: int, size: int) -> Fraction:
    """2 (n - 1) / n of the array's bytes."""
    return Fraction(2 * (ways - 1), ways) * size


def gather(ways: int, size: int) -> Fraction:
    """(n - 1) / n of the whole array's bytes: of an all-gather, and of a reduce-scatter."""
    return Fraction(ways - 1, ways) * size


def together(volumes: Iterable[Volumes]) -> Volumes:
    """Summed."""
    total: Counter[tuple[str, str]] = Counter()
    for volume in volumes:
        total.update(volume)  # type: ignore[arg-type]
    return dict(total)  # type: ignore[arg-type]


@dataclass(frozen=True)
class SummedWhole:
    """What XLA:TPU all-reduces whole where it is asked for shards: 2 (n - 1) / n instead of (n - 1) / n.

    summed: parts of the paths of parameters whose gradients it sums whole and then slices. It fuses an
    all-reduce and the slice of the sum into a reduce-scatter where the dimension that is cut, embed, is the
    second minor one of the array's layout; where embed is minor, and a shard less than two tiles of 128
    lanes, or where it is further out, it does not. Norms' scales it never scatters.
    padded: parts of the paths of norms' scales, and how often per step their shards, padded with zeros, are
    summed instead of gathered: those of 64 numbers are less than a tile.
    once: of the f32 sums of all microbatches; else of every microbatch, in the type of the gradients.
    """

    axis: str
    ways: int
    summed: tuple[str, ...]
    padded: tuple[tuple[str, int], ...] = ()
    once: bool = False

    def instead(self, volumes: Volumes, sizes: Mapping[str, int], element: int, microbatches: int) -> Volumes:
        """Of a closed form. sizes: of parameters, by path. element: bytes of a matrix's gradient."""
        scatters = sum(
            gather(self.ways, size * (F32 if self.once or "norm" in path else element))
            for path, size in sizes.items()
            if any(part in path for part in self.summed)
        ) * (1 if self.once else microbatches)
        gathers = sum(
            times * gather(self.ways, F32 * size)
            for part, times in self.padded
            for path, size in sizes.items()
            if part in path and "norm" in path
        )
        changes = {
            (self.axis, "reduce-scatter"): Fraction(-scatters),
            (self.axis, "all-gather"): Fraction(-gathers),
            (self.axis, "all-reduce"): Fraction(2 * (scatters + gathers)),
        }
        return together([volumes, changes])


def data_parallel(axis: str, ways: int, gradient_bytes: int) -> Volumes:
    """One all-reduce of the gradients per step: 2Ψ (ZeRO, arXiv:1910.02054, section 7.1), however many
    microbatches."""
    return {(axis, "all-reduce"): all_reduce(ways, gradient_bytes)}


def zero1(axis: str, ways: int, params: int) -> Volumes:
    """Gradients reduce-scattered, f32, and updated parameters gathered, f32, once per step: 2Ψ (section
    7.2.1, where gradients are partitioned too; Megatron-LM's distributed optimizer does this)."""
    half = gather(ways, F32 * params)
    return {(axis, "reduce-scatter"): half, (axis, "all-gather"): half}


def zero2(axis: str, ways: int, params: int, gradient_bytes: int, microbatches: int) -> Volumes:
    """Gradients reduce-scattered for every microbatch, Ψ each, since whole sums are not kept (section 7.2.1);
    updated parameters gathered once. gradient_bytes: of all gradients, as computed."""
    return {
        (axis, "reduce-scatter"): microbatches * gather(ways, gradient_bytes),
        (axis, "all-gather"): gather(ways, F32 * params),
    }


def fsdp(
    axis: str, ways: int, layer_bytes: int, outer_bytes: int, microbatches: int, *, outer_gathers: int
) -> Volumes:
    """ZeRO-3, section 7.2.2: Ψ gathered forward, Ψ backward, Ψ of gradients scattered, every microbatch.

    outer_gathers: how often embedding, final norm and head are gathered: what they gave is kept for backward.
    """
    gathered = 2 * microbatches * layer_bytes + outer_gathers * outer_bytes
    return {
        (axis, "all-gather"): gather(ways, gathered),
        (axis, "reduce-scatter"): microbatches * gather(ways, layer_bytes + outer_bytes),
    }


def megatron(axis: str, ways: int, layers: int, stream_bytes: int, *, backward: int = 2) -> Volumes:
    """A layer all-reduces the residual stream twice forward and twice backward (arXiv:1909.08053, section 3,
    figure 4); the vocabulary-parallel embedding once forward, the head once backward.

    backward: all-reduces of a layer's backward pass where a compiler reduces each projection's.
    """
    count = layers * (2 + backward) + 2
    return {(axis, "all-reduce"): count * all_reduce(ways, stream_bytes)}


def sequence_parallel(axis: str, ways: int, layers: int, stream_bytes: int, norm_bytes: int) -> Volumes:
    """`megatron` with every all-reduce as a reduce-scatter and an all-gather (arXiv:2205.05198, section
    4.2.2). Each device has the gradients of the norms' scales for its part of the sequence: one all-reduce.
    """
    half = (4 * layers + 2) * gather(ways, stream_bytes)
    return {
        (axis, "reduce-scatter"): half,
        (axis, "all-gather"): half,
        (axis, "all-reduce"): all_reduce(ways, norm_bytes),
    }


def vocabulary_loss(axis: str, ways: int, tokens: int) -> Volumes:
    """Per token three f32 numbers: the greatest logit, Σ exp(logit), the target's logit (Megatron-LM,
    section 3: "dramatically reduces the communication" from B·L·V to B·L)."""
    return {(axis, "all-reduce"): 3 * all_reduce(ways, F32 * tokens)}


def two_dimensional(
    x: tuple[str, int],
    y: tuple[str, int],
    *,
    layers: int,
    tokens: int,
    sizes: tuple[int, int, int, int],
    element: int,
    backward: int = 2,
) -> Volumes:
    """2-D weight-stationary (arXiv:2211.05102, section 3.2.2): weights E/y × F/x, activations E/y or F/x.

    A product sums over the axis that splits what it contracts. Over x, of E/y: as `megatron`. Over y, of what
    x splits: forward query, key, value, gate, up; backward those of output and down; the logits. Norms sum
    over y once forward, once backward, a number per token. sizes: embed, heads · head_dim (as many KV heads),
    mlp, vocab, whole. element: bytes of an activation.
    """
    embed, heads, mlp, vocab = sizes
    (x_name, x_ways), (y_name, y_ways) = x, y
    over_x = megatron(x_name, x_ways, layers, tokens * embed // y_ways * element, backward=backward)
    products = layers * (4 * heads + 3 * mlp) + vocab
    over_y = all_reduce(y_ways, tokens * products // x_ways * element)
    norms = (4 * layers + 2) * all_reduce(y_ways, F32 * tokens)
    return together([over_x, {(y_name, "all-reduce"): over_y + norms}])
