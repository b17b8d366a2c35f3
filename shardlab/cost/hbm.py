"""HBM traffic: bytes that each instruction of a compiled program reads from and writes to device memory.

Between two instructions that are not fused, a value is in memory: an instruction reads its operands and
writes its result, each once, and what a fusion keeps inside costs nothing (`cost/fused.py`). Slices are read
as far as they go and updates are written in place. Sizes are logical: no padding to tiles. HBM is the
device's main memory; on a CPU, RAM. What is in VMEM, in scalar memory (TPU) or on the host (memory space 5)
is counted apart.

For a CPU program without loops it is XLA's `bytes accessed` (`HloCostAnalysis`), with these differences: a
gather reads the rows that it takes and a scatter those that it changes, not the table; loops count every
trip; the pointers of a tuple are not counted. The TPU compiler's own figure adds the padding of tiles and
what moves in VMEM; for GPU targets without a GPU there is none. It is a lower bound where an algorithm
passes over its data more than once: sorts, collectives (each operand read and result written once), flash
attention (which reads keys and values again for each block of queries). Caches are not modelled: two
instructions that read one value read it twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from shardlab.attribute.calls import CallGraph
from shardlab.attribute.edges import CallSites
from shardlab.attribute.payload import payload_of
from shardlab.cost.fused import FusedTraffic, fused_traffic, operand_shape
from shardlab.cost.kernels import NO_FLOPS, kernel_work
from shardlab.cost.products import NotCountedError
from shardlab.hlo.attributes import computation_names
from shardlab.hlo.module import Computation, Instruction, Module, Operand, Shape
from shardlab.hlo.shape import array_leaves, try_shape_bytes

HOST_MEMORY = 5  # HLO.md section 2.2: S(5) on TPU and GPU; other spaces of a GPU are parts of HBM

# Names for what is elsewhere, or run what is counted where it stands.
_FREE_WORDS = """
    add-dependency after-all async-start bitcast call call-start conditional constant domain
    get-dimension-size get-tuple-element opt-barrier parameter partition-id replica-id tuple while
"""
_FREE = frozenset(_FREE_WORDS.split())
_FREE_CALLS = frozenset({
    "AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast", "GatherScatterIndicesBitpacked",
    "GetPartitionId", "LayoutConstraint", "MoveToDevice", "MoveToHost", "PinToDevice", "SPMDFullToShardShape",
    "SPMDShardToFullShape", "Sharding", "SliceId", "annotate_device_placement",
})  # fmt: skip
_MANY_PASSES = frozenset({"TopK", "__cub$DeviceRadixSort", "__gpu$TopK"})
_ON_CPU_ONE = (
    "TopK"  # a partial sort of a row at a time (xla/service/cpu/runtime_topk.cc): as `sort`, one pass
)
_OPAQUE = "a kernel whose memory traffic the program does not show"


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of one execution: read from HBM, written to HBM, and read or written in other memory.

    host_bytes: the part of `other_bytes` that is in the host's memory.
    """

    read_bytes: int
    written_bytes: int
    other_bytes: int = 0
    host_bytes: int = 0


def fused_computations(sites: CallSites) -> frozenset[str]:
    """Computations that run inside one instruction: fusions and kernels, with all that those call."""
    inside: set[str] = set()
    for name in sites.order:  # callers first
        for site in sites.by_caller[name]:
            if name in inside or site.instruction.opcode.removesuffix("-start") in ("fusion", "custom-call"):
                inside.add(site.callee)
    return frozenset(inside)


def all_fused_traffic(module: Module, graph: CallGraph, fused: Iterable[str]) -> dict[str, FusedTraffic]:
    """What each of the `fused` computations reads and writes, by its name."""
    found: dict[str, FusedTraffic] = {}
    wanted = frozenset(fused)
    for name in reversed(graph.sites.order):  # callees first
        if name in wanted:
            found[name] = fused_traffic(module.computations[name], found)
    return found


def instruction_traffic(
    instruction: Instruction, computation: Computation, fused: Mapping[str, FusedTraffic], backend: str
) -> Traffic | None:
    """Traffic of one execution of an instruction that is not fused; None when it moves nothing itself.

    The start of an asynchronous pair carries all of it. Raises NotCountedError when it cannot be known.
    """
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith(("-done", "-update")) or _is_free_call(instruction):
        return None
    if "slice_sizes" in instruction.attributes and opcode.startswith("collective-permute"):
        moved = payload_of(computation, instruction, "collective-permute").operand_bytes
        return Traffic(_known(moved), _known(moved))
    shapes = [operand_shape(use, computation) for use in instruction.operands]
    results = _results(instruction)
    if opcode.removesuffix("-start") == "fusion":
        callee = computation_names(instruction, "calls")
        traffic = fused.get(callee[0]) if callee else None
    else:
        _check_call(instruction, shapes, backend)
        traffic = _alone(instruction, shapes, results)
    if traffic is None or len(traffic.writes) != len(results):
        raise NotCountedError("the result is not that of the fused computation")
    return _by_memory(traffic, shapes, results, backend)


def _by_memory(
    traffic: FusedTraffic, shapes: list[Shape | None], results: list[Shape], backend: str
) -> Traffic:
    read = written = other = host = 0
    for position, size in traffic.reads.items():
        shape = shapes[position] if position < len(shapes) else None
        if shape is None:
            raise NotCountedError("an operand that is not defined")
        for leaf in array_leaves(shape):
            moved = _known(try_shape_bytes(leaf) if shape.leaves else size)
            read, other = _add(read, other, moved, leaf, backend)
            host += moved if leaf.memory_space == HOST_MEMORY else 0
    for leaf, size in zip(results, traffic.writes, strict=True):
        written, other = _add(written, other, _known(size), leaf, backend)
        host += _known(size) if leaf.memory_space == HOST_MEMORY else 0
    return Traffic(read, written, other, host)


def _add(hbm: int, other: int, moved: int, shape: Shape, backend: str) -> tuple[int, int]:
    return (hbm + moved, other) if is_hbm(shape, backend) else (hbm, other + moved)


def is_hbm(shape: Shape, backend: str) -> bool:
    """Whether an array lies in the device's main memory: other spaces of a GPU, but the host's, are in it."""
    space = shape.memory_space
    return space == 0 or (backend in ("gpu", "cpu") and space != HOST_MEMORY)


def _alone(instruction: Instruction, shapes: list[Shape | None], results: list[Shape]) -> FusedTraffic:
    """An instruction that is not fused is like a fusion of one."""
    if None in shapes:
        raise NotCountedError("an operand that is not defined")
    names = [f"%{position}" for position in range(len(shapes))]
    parameters = [
        Instruction(name, "parameter", shape, literal=str(position))
        for position, (name, shape) in enumerate(zip(names, shapes, strict=True))
        if shape is not None
    ]
    shape = results[0] if len(results) == 1 else Shape("tuple", leaves=tuple(results))
    if not results and shapes and shapes[0] is not None:  # a send: its result is on another device
        shape = shapes[0]
    one = replace(
        instruction,
        name="%root",
        opcode=instruction.opcode.removesuffix("-start"),
        shape=shape,
        operands=tuple(Operand(name) for name in names),
    )
    body = {each.name: each for each in (*parameters, one)}
    traffic = fused_traffic(Computation("alone", body, "%root"), {})
    return traffic if results else replace(traffic, writes=())


def _results(instruction: Instruction) -> list[Shape]:
    """The arrays that an instruction writes: not the operands and contexts in the tuple of a start."""
    opcode, shape = instruction.opcode, instruction.shape
    if opcode == "send":
        return []
    position = {"copy-start": 0, "recv": 0}.get(opcode, 1 if opcode.endswith("-start") else None)
    if position is not None and opcode != "all-reduce-start":
        if position >= len(shape.leaves):
            raise NotCountedError("a start without a result")
        shape = shape.leaves[position]
    leaves = array_leaves(shape)
    target = instruction.attributes.get("custom_call_target", "").strip('"')
    is_workspace = len(leaves) > 1 and leaves[-1].dtype in ("s8", "u8") and len(leaves[-1].dims) == 1
    return leaves[:-1] if is_workspace and target.startswith(("__cublas$", "__cudnn$")) else leaves


def _is_free_call(instruction: Instruction) -> bool:
    return (
        instruction.opcode == "custom-call"
        and instruction.attributes.get("custom_call_target", "").strip('"') in _FREE_CALLS
    )


def _check_call(instruction: Instruction, shapes: list[Shape | None], backend: str) -> None:
    """Raises NotCountedError for a kernel that may read its operands in part, or more than once."""
    if not instruction.opcode.startswith("custom-call"):
        return
    target = instruction.attributes.get("custom_call_target", "").strip('"')
    if backend == "cpu" and target == _ON_CPU_ONE:
        return
    if target in _MANY_PASSES:
        raise NotCountedError(_OPAQUE)
    if target not in NO_FLOPS and not {"calls", "called_computations"} & instruction.attributes.keys():
        kernel_work(instruction, shapes)


def _known(size: int | None) -> int:
    if size is None:
        raise NotCountedError("an array of unknown size")
    return size
