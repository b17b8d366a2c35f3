"""How far back attention sees: within a window, a chunk, or everywhere; and how many pairs meet then."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Locality:
    """Of the tokens at or before it, which a token sees; false where it sees all.

    window: this many, the last of them itself (Mistral, arXiv:2310.06825, section 2). chunk: those of its own
    chunk of so many (Llama 4: `attention_chunk_size` in transformers' `Llama4TextConfig`). 0: no such limit.
    With both, what both let it see.
    """

    window: int = 0
    chunk: int = 0

    def __bool__(self) -> bool:
        return bool(self.window or self.chunk)

    def __str__(self) -> str:
        named = (("a window", self.window), ("chunks", self.chunk))
        return " and ".join(f"{what} of {tokens}" for what, tokens in named if tokens)

    @property
    def tokens(self) -> int:
        """How many a token sees at most; 0 for all."""
        return min(filter(None, (self.window, self.chunk)), default=0)

    def within(self, seq: int) -> Locality:
        """What sequences of so many tokens notice of it."""
        chunk = self.chunk if self.chunk < seq else 0
        return Locality(self.window if self.window < (chunk or seq) else 0, chunk)

    def pairs_times_two(self, seq: int, *, causal: bool) -> int:
        """Twice the pairs of positions that attend: of a segment of s tokens with windows of w <= s that is
        2 · s · w, less w² where only pairs at or before the diagonal count, half of it as in s² / 2. Segments
        are chunks, of which the last may be shorter, or the whole sequence."""
        chunk = self.chunk or seq
        whole, rest = divmod(seq, chunk)

        def of(tokens: int) -> int:
            seen = min(self.window or tokens, tokens)
            return 2 * tokens * seen - (seen * seen if causal else 0)

        return whole * of(chunk) + of(rest)
