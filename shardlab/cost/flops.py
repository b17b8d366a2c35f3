"""Floating-point work of a step: what the compiled program does, and what the model needs.

Hardware FLOPs count every matrix product, convolution and fused attention kernel of the compiled program as
often as it runs, recomputation included; of a conditional the dearest branch, whether it is taken or masked
out. Elementwise work is left out, as in all such counts. Model FLOPs
are the formula that MFU is defined with. XLA's own `cost_analysis` counts a loop body once and fused
kernels not at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from shardlab.attribute.calls import CallGraph, call_graph, step_totals
from shardlab.cost.kernels import Work, kernel_work
from shardlab.cost.products import (
    NotCountedError,
    convolution_flops,
    convolution_shape,
    dot_flops,
    dot_shape,
)
from shardlab.hlo.lookup import of_opcodes
from shardlab.hlo.module import Computation, Instruction, Module, Operand, Shape
from shardlab.spec.locality import Locality
from shardlab.spec.models import ModelConfig
from shardlab.spec.param_counts import attention_weights, mlp_weights

_OPAQUE_PRODUCTS = frozenset({"ragged-dot", "scaled-dot", "cholesky", "triangular-solve", "fft"})
_WORKING = _OPAQUE_PRODUCTS | {"dot", "convolution", "custom-call"}
_WORKING_OPCODES = _WORKING | {f"{opcode}-start" for opcode in _WORKING}


@dataclass(frozen=True, slots=True)
class NotCountedWork:
    """An instruction whose FLOPs are not in the totals, and why."""

    name: str
    what: str
    why: str


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix product, convolution or attention kernel, and the work of one execution.

    dtype: of its operands (of the first two, the wider), as the program has them: an f8 product that the
    compiler widened is bf16. "unknown" where no operand says.
    """

    instruction: Instruction
    work: Work
    dtype: str = "unknown"


@dataclass(frozen=True, slots=True)
class Products:
    """The products of a program by the computation that they stand in, and what could not be counted.

    unknown_places: the computation and name of each of `unknown`.
    """

    by_computation: Mapping[str, tuple[Product, ...]]
    unknown: tuple[NotCountedWork, ...]
    unknown_places: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Flops:
    """FLOPs per device per step; of a conditional the dearest branch. None: in a loop that cannot be bounded.

    by_dtype: the same by the type of the operands (of two, the wider), which decides how fast a chip is.
    unknown: instructions that are not in these numbers. notes: assumptions that are.
    """

    matmul: int | None
    attention: int | None
    by_dtype: Mapping[str, int | None] = field(default_factory=dict, compare=False)
    unknown: tuple[NotCountedWork, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> int | None:
        """matmul + attention; None when either is unknown."""
        return None if self.matmul is None or self.attention is None else self.matmul + self.attention


def hardware_flops(module: Module, graph: CallGraph | None = None) -> Flops:
    """FLOPs of one device's program per step, with trip counts. graph: the module's call graph, if at hand.

    Raises ParseError as `call_graph` does.
    """
    graph = graph or call_graph(module)
    return total_flops(graph, find_products(module, graph))


def find_products(module: Module, graph: CallGraph) -> Products:
    """Every product of the computations that run. Raises ParseError for metadata that cannot be read."""
    found: dict[str, tuple[Product, ...]] = {}
    unknown: list[NotCountedWork] = []
    places: list[tuple[str, str]] = []
    for name, times in graph.times.items():
        before = len(unknown)
        products = tuple(_products(module.computations[name], unknown)) if times[1] != 0 else ()
        places += ((name, work.name) for work in unknown[before:])
        if products:
            found[name] = products
    return Products(found, tuple(unknown), tuple(places))


def total_flops(graph: CallGraph, products: Products) -> Flops:
    """The products summed over a step: as often as they run, of a conditional the dearest branch."""
    amounts: dict[str, dict[str, Fraction]] = {}
    by_type: dict[str, dict[str, Fraction]] = {}
    notes: dict[str, None] = {}
    for name, found in products.by_computation.items():
        done = amounts.setdefault(name, {})
        for product in found:
            done[product.work.kind] = done.get(product.work.kind, Fraction(0)) + product.work.flops
            if product.work.note:
                notes[product.work.note] = None
            typed = by_type.setdefault(name, {})
            typed[product.dtype] = typed.get(product.dtype, Fraction(0)) + product.work.flops
    totals = step_totals(graph, amounts)
    return Flops(
        matmul=_upper(totals, "matmul"),
        attention=_upper(totals, "attention"),
        by_dtype=_by_dtype(step_totals(graph, by_type)),
        unknown=products.unknown,
        notes=tuple(notes),
    )


def _by_dtype(totals: Mapping[str, tuple[Fraction, Fraction | None]]) -> dict[str, int | None]:
    return {dtype: _upper(totals, dtype) for dtype in sorted(totals)}


def _upper(totals: Mapping[str, tuple[Fraction, Fraction | None]], kind: str) -> int | None:
    high = totals[kind][1] if kind in totals else Fraction(0)
    return None if high is None else int(high)


def _products(computation: Computation, unknown: list[NotCountedWork]) -> Iterator[Product]:
    """The work of one run of a computation's own instructions; what cannot be counted is appended to
    `unknown`."""
    for instruction in of_opcodes(computation.instructions, _WORKING_OPCODES):
        try:
            work = _work(instruction, computation)
        except NotCountedError as reason:
            what = instruction.attributes.get("custom_call_target", instruction.opcode).strip('"')
            unknown.append(NotCountedWork(instruction.name, what, str(reason)))
            continue
        if work is not None:
            yield Product(instruction, work, _dtype(instruction, computation))


def _work(instruction: Instruction, computation: Computation) -> Work | None:
    opcode = instruction.opcode.removesuffix("-start")
    if opcode == "dot":
        lhs = _operand(instruction, 0, computation)
        return Work("matmul", dot_flops(instruction, lhs), shape=dot_shape(instruction, lhs))
    if opcode == "convolution":
        lhs, kernel = (_operand(instruction, index, computation) for index in (0, 1))
        flops = convolution_flops(instruction, lhs, kernel, instruction.shape)
        shape = convolution_shape(instruction, lhs, kernel, instruction.shape)
        return Work("matmul", flops, shape=shape)
    if opcode == "custom-call" and not {"calls", "called_computations"} & instruction.attributes.keys():
        return kernel_work(instruction, [_shape_of(use, computation) for use in instruction.operands])
    if opcode in _OPAQUE_PRODUCTS:
        raise NotCountedError(f"{opcode} is not counted")
    return None


def _dtype(instruction: Instruction, computation: Computation) -> str:
    """Of the operands, not of a kernel's masks and tables: floats where there are any, else integers."""
    shapes = (_shape_of(use, computation) for use in instruction.operands)
    arrays = [s.dtype for s in shapes if s is not None and not s.leaves and len(s.dims) > 1]
    floats = [dtype for dtype in arrays if dtype.startswith(("f", "bf"))]
    return max((floats or arrays)[:2], key=_bits, default="unknown")


def _bits(dtype: str) -> int:
    """f8e4m3fn -> 8."""
    digits = re.search(r"[0-9]+", dtype)
    return int(digits[0]) if digits else 0


def _operand(instruction: Instruction, index: int, computation: Computation) -> Shape | None:
    return _shape_of(instruction.operands[index], computation) if index < len(instruction.operands) else None


def _shape_of(use: Operand, computation: Computation) -> Shape | None:
    source = computation.instructions.get(use.name)
    shape = source.shape if source is not None else None
    for index in use.index:
        shape = shape.leaves[index] if shape is not None and index < len(shape.leaves) else None
    return shape


def model_flops(
    config: ModelConfig,
    batch: int,
    seq: int,
    workload: Literal["train", "prefill", "decode"],
    attention: Literal["causal", "full"] = "causal",
    chunk: int = 1,
    *,
    frozen: bool = False,
) -> int:
    """FLOPs that the model needs for one step of all devices together: no recomputation, no padding, real
    vocabulary.

    Per token 2 · (weights in matrix products, head included, embedding lookup not) forward and twice that
    backward; plus 2 · heads · (head_dim + value_dim) per layer and pair of positions that attend, again three
    times that in training. `causal` counts half of the seq² pairs, `full` all (Megatron's convention);
    where attention is local (windows, chunks) see `Locality.pairs_times_two`.
    Prefill needs the head for one position per sequence. Decode is `chunk` new tokens per sequence, which
    attend to `seq` cached ones, or to as many of them as they see at most, and the head for one; latent
    attention does so in the latent space, 2 · heads · (2 · kv_rank + rope_dim) per pair (DeepSeek-V2,
    arXiv:2405.04434, section 2.1.2). Experts count as often as a token uses them, and so do shared ones and
    the router. batch: sequences. frozen: weights have no gradient (LoRA), 4·N·D; what adapters do is left
    out.
    Source: the usual 6·N·D, as in PaLM (arXiv:2204.02311, appendix B) with the causal half made explicit.
    """
    layers = sum(stack.layers * _layer_weights(stack.config) for stack in config.stacks)
    head = config.embed * config.vocab
    attend = 2 * config.heads * (config.head_dim + config.value_dim)  # q·k and p·v
    if workload == "decode":
        if config.latent is not None:
            attend = 2 * config.heads * (2 * config.latent.kv_rank + config.latent.rope_dim)
        seen = sum(min(local.tokens or seq, seq) for local in _localities(config))
        return batch * (2 * (layers * chunk + head) + attend * chunk * seen)
    pairs = sum(local.pairs_times_two(seq, causal=attention == "causal") for local in _localities(config))
    passes = 3 if workload == "train" else 1
    heads_run = seq if workload == "train" else 1
    weight_passes = passes - 1 if frozen and workload == "train" else passes
    weights = weight_passes * 2 * (layers * seq + head * heads_run)
    return batch * (weights + passes * (attend * pairs // 2))


def _localities(config: ModelConfig) -> list[Locality]:
    """How far each layer sees."""
    return [Locality() if config.sees_all(layer) else config.locality for layer in range(config.layers)]


def _layer_weights(config: ModelConfig) -> int:
    """Elements of the kernels that one token meets in one layer."""
    times = config.experts_per_token + config.shared_experts if config.num_experts else 1
    mlp = times * mlp_weights(config, config.mlp)
    return attention_weights(config) + mlp + config.embed * config.num_experts
