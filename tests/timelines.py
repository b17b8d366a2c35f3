"""Timelines made by hand, a second or so each event."""

from __future__ import annotations

from shardlab.cost.blocks import Block, Event
from shardlab.cost.timeline import Timeline


def kernel(start_s: float, duration_s: float) -> Event:
    """A kernel on the compute stream."""
    return Event(
        name="fusion.1",
        kind="fusion",
        stream="compute",
        layer="layers/mlp",
        phase="forward",
        start_s=start_s,
        duration_s=duration_s,
    )


def gather(start_s: float, duration_s: float, stream: str = "collectives") -> Event:
    """A collective over two axes."""
    return Event(
        name="all-gather.1",
        kind="all-gather",
        stream=stream,
        layer="layers/mlp",
        axes=("fsdp", "tensor"),
        communicates=True,
        start_s=start_s,
        duration_s=duration_s,
    )


def block(duration_s: float, *events: Event) -> Block:
    """One run of a computation; its sums are left out."""
    return Block(
        events=events, duration_s=duration_s, compute_s=0.0, communication_s=0.0, exposed_s=0.0, path=()
    )


def loop(start_s: float, body: Block, iterations: float) -> Event:
    """A loop of equal turns."""
    return Event(
        name="while.1",
        kind="while",
        stream="compute",
        start_s=start_s,
        duration_s=body.duration_s * iterations,
        iterations=iterations,
        body=body,
    )


def line(root: Block) -> Timeline:
    """A step of this block."""
    return Timeline(
        step_time_s=root.duration_s,
        compute_s=0.0,
        communication_s=0.0,
        exposed_communication_s=0.0,
        critical_path=(),
        root=root,
    )
