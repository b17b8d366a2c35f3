"""What holds a device's memory during a step: parameters, optimizer, activations, gradients, cache and the
rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from shardlab.cost.liveness import Peak
from shardlab.cost.memory import reserved_bytes
from shardlab.program import Argument, Memory

# cuBLAS gets so much from XLA:GPU for each product, once autotuning has chosen it: NVIDIA's advice
# (docs.nvidia.com/cuda/cublas, cublasSetWorkspace), in XLA `GemmConfig::kHopperWorkspace` and
# `kDefaultWorkspace`.
HOPPER_WORKSPACE_BYTES = 32 << 20
WORKSPACE_BYTES = 4 << 20
HOPPER_MAJOR = 9


@dataclass(frozen=True, slots=True)
class Owners:
    """Bytes per device at the step's fullest moment, largest first.

    by_owner: parameters, optimizer, inputs, cache and results from the program's arguments and results;
    activations (kept from forward to backward), gradients (kept for the optimizer), collectives (what they
    received) and temporaries from the values alive at the peak. A program whose arguments have no known
    meaning has them as `arguments`. unexplained_bytes: what the compiler reserves beyond their sum, for
    padding and gaps; below zero where it shares memory that we count twice.
    """

    by_owner: Mapping[str, int]
    unexplained_bytes: int


def memory_owners(
    arguments: Iterable[Argument] | None, workload: str, peak: Peak | None, memory: Memory | None
) -> Owners | None:
    """Who holds what the compiler reserves; None where it does not say what it reserves, or nothing says what
    is alive. workload: train, prefill or decode, which tells what the step's arguments are."""
    reserved = reserved_bytes(memory) if memory is not None else None
    if memory is None or memory.argument_bytes is None or reserved is None or peak is None:
        return None
    sizes: dict[str, int] = {}
    for argument in arguments or ():
        owner = argument_owner(argument.path, workload)
        sizes[owner] = sizes.get(owner, 0) + argument.device_bytes
    # What the arguments take beyond their arrays (alignment), or all of it where they are not known.
    rest = memory.argument_bytes - sum(sizes.values())
    sizes["arguments"] = max(0, rest)
    sizes["results"] = (memory.output_bytes or 0) - (memory.alias_bytes or 0)
    sizes |= peak.by_owner
    ordered = sorted((item for item in sizes.items() if item[1]), key=lambda item: (-item[1], item[0]))
    return Owners(dict(ordered), reserved - sum(size for _, size in ordered))


def argument_owner(path: str, workload: str) -> str:
    """Whose an argument of a step is, by where it stands: `parallel.step.Step` says what the steps take."""
    if workload == "train":
        for member, owner in ((".params", "parameters"), (".optimizer", "optimizer")):
            if path.startswith(f"arguments[0]{member}"):
                return owner
        return "inputs" if path.startswith("arguments[1]") else "arguments"
    if path.startswith("arguments[0]"):
        return "parameters"
    return "cache" if workload == "decode" and path.startswith("arguments[1]") else "inputs"


def memory_band(
    memory: Memory | None, autotuned: bool | None, compute_major: int | None
) -> tuple[int, int] | None:
    """Bytes per device between which a real run lies, for a GPU program that was not autotuned; else None.

    Low: the compiler's peak. High: what it reserves, with the workspace of a cuBLAS product that autotuning
    may choose in place of a Triton fusion. compute_major: of the GPU's compute capability; None: the larger.
    """
    reserved = reserved_bytes(memory) if memory is not None else None
    if memory is None or autotuned is not False or reserved is None:
        return None
    hopper = compute_major is None or compute_major >= HOPPER_MAJOR
    workspace = HOPPER_WORKSPACE_BYTES if hopper else WORKSPACE_BYTES
    return min(memory.peak_bytes or reserved, reserved), reserved + workspace
