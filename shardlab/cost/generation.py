"""What one generated token costs: the bytes of a decode step shared among the tokens that it generates."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """tokens_per_step: of all devices, one per sequence. The others: bytes per token and device, None where
    they are not known; every device does its part of every token.
    """

    tokens_per_step: int
    hbm_bytes_per_token_per_device: float | None
    wire_bytes_per_token_per_device: float | None


def generation(
    tokens: int, hbm_bytes: tuple[int | None, int | None] | None, wire_bytes: Fraction | None
) -> Generation:
    """hbm_bytes: read and written, wire_bytes: sent, each of one device in a step."""
    read, written = hbm_bytes or (None, None)
    return Generation(
        tokens_per_step=tokens,
        hbm_bytes_per_token_per_device=None if read is None or written is None else (read + written) / tokens,
        wire_bytes_per_token_per_device=None if wire_bytes is None else float(wire_bytes / tokens),
    )
