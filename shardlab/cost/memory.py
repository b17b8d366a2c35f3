"""Does a compiled program fit: the compiler's memory figures against the limit that really holds on the
machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shardlab.hardware.machine import Machine
from shardlab.program import Memory, Refusal
from shardlab.units import format_bytes

TIGHT_ABOVE = 0.92  # of the limit: fragmentation and what the runtime itself allocates eat the rest

Fits = Literal["yes", "tight", "no"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryFit:
    """Memory per device against its limit. Bytes; None is unknown, never zero.

    peak_bytes: the compiler's own figure. needed_bytes: what a run holds, the larger of the peak and
    of what is reserved (on emulated CPU the compiler's peak leaves the temporaries out); the verdict
    follows it.
    host_bytes: what lies in the host's memory beside it (offloaded), outside all the others.
    deficit_bytes: what is missing, 0 when it fits. fits: `tight` above 92 % of the limit; None without a
    limit. note: what a reader must know of these figures, "" when nothing.
    """

    argument_bytes: int | None
    temp_bytes: int | None
    peak_bytes: int | None
    needed_bytes: int | None
    limit_bytes: int | None
    limit_source: str
    deficit_bytes: int | None
    fits: Fits | None
    host_bytes: int | None = None
    note: str = ""


def memory_report(memory: Memory | None, refusal: Refusal | None, machine: Machine) -> MemoryFit:
    """Judge a program's memory on `machine`.

    The limit is JAX's default pool on GPUs (`pool_fraction` of the card), the compiler's own on TPUs, and
    does not exist on emulated devices. A refusal of the compiler decides by itself, since nothing else is
    known of the program.
    """
    if refusal is not None:
        return _refused(refusal, memory or Memory())
    memory = memory or Memory()
    peak, note = peak_bytes(memory)
    needed = max((size for size in (peak, reserved_bytes(memory)) if size is not None), default=None)
    limit, source = memory_limit(machine)
    fits = _fits(needed, limit)
    if fits == "no" and machine.chip.family == "tpu":
        # The TPU compiler refuses what does not fit. It compiled this: the listed limit is what is in doubt.
        fits, note = "tight", "the compiler accepted more than the chip's listed memory"
        if _fits(peak, limit) != "no":
            sizes = f"{format_bytes(needed)} are reserved, but the compiler's peak is {format_bytes(peak)}"
            note = f"{sizes}, and it accepted the program"
    elif fits != _fits(peak, limit):
        note = (
            f"{format_bytes(needed)} are reserved: temporaries are one block with gaps, larger than the peak"
        )
    return MemoryFit(
        argument_bytes=memory.argument_bytes,
        temp_bytes=memory.temp_bytes,
        peak_bytes=peak,
        needed_bytes=needed,
        limit_bytes=limit,
        limit_source=source,
        deficit_bytes=_deficit(needed, limit, fits),
        fits=fits,
        host_bytes=memory.host_bytes or None,
        note=note,
    )


def peak_bytes(memory: Memory) -> tuple[int | None, str]:
    """The compiler's peak; where it has none, or one that counts the host's memory too, arguments + outputs -
    aliases + temporaries, with a note that says so."""
    reserved = reserved_bytes(memory)
    if memory.peak_bytes and memory.host_bytes and reserved is not None and memory.peak_bytes > reserved:
        both = f"the compiler's peak of {format_bytes(memory.peak_bytes)} counts the host's memory too"
        return reserved, f"{both}: arguments + outputs - aliases + temporaries are the device's"
    if memory.peak_bytes:
        return memory.peak_bytes, ""
    if reserved is None:
        return None, "the compiler gave no memory analysis"
    return reserved, "the compiler gave no peak: arguments + outputs - aliases + temporaries"


def reserved_bytes(memory: Memory) -> int | None:
    """Arguments + outputs - aliases + temporaries: what a run holds, gaps in the temporary block included."""
    if memory.argument_bytes is None or memory.temp_bytes is None:
        return None
    return memory.argument_bytes + (memory.output_bytes or 0) - (memory.alias_bytes or 0) + memory.temp_bytes


def memory_limit(machine: Machine) -> tuple[int | None, str]:
    """Bytes one device may use, and where that limit comes from; None where no limit is known."""
    if machine.emulated:
        return None, "none: emulated devices share the host's memory"
    return machine.chip.memory_limit_bytes, machine.chip.memory_limit_source


def _refused(refusal: Refusal, memory: Memory) -> MemoryFit:
    return MemoryFit(
        argument_bytes=memory.argument_bytes,
        temp_bytes=memory.temp_bytes,
        peak_bytes=refusal.needed_bytes,
        needed_bytes=refusal.needed_bytes,
        limit_bytes=refusal.limit_bytes,
        limit_source="the compiler, which refused the program",
        deficit_bytes=max(0, refusal.needed_bytes - refusal.limit_bytes),
        fits="no",
    )


def _deficit(needed: int | None, limit: int | None, fits: Fits | None) -> int | None:
    if needed is None or limit is None:
        return None
    return needed - limit if fits == "no" else 0


def _fits(needed: int | None, limit: int | None) -> Fits | None:
    if needed is None or limit is None:
        return None
    if needed > limit:
        return "no"
    return "tight" if needed > TIGHT_ABOVE * limit else "yes"
