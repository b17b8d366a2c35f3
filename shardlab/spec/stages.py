"""How the layers of a model lie on the stages of a pipeline. Pure values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLayout:
    """How layers lie on stages. counts: layers of each link (chunk c of stage s is link c · stages + s).

    A layer parameter is stored as [stages, slots, …]: every chunk has as many slots as the longest, unused
    ones are zero and stay so.
    """

    stages: int
    virtual: int
    counts: tuple[int, ...]

    @property
    def chunk_slots(self) -> int:
        """Slots of one chunk: the most layers that a link has."""
        return max(self.counts)

    @property
    def slots(self) -> int:
        """Slots of one stage."""
        return self.virtual * self.chunk_slots

    def layers(self) -> tuple[tuple[int | None, ...], ...]:
        """For each stage and slot the layer that it holds, None when it is unused."""
        starts = [sum(self.counts[:link]) for link in range(len(self.counts))]

        def layer(stage: int, slot: int) -> int | None:
            chunk, position = divmod(slot, self.chunk_slots)
            link = chunk * self.stages + stage
            return starts[link] + position if position < self.counts[link] else None

        return tuple(tuple(layer(s, slot) for slot in range(self.slots)) for s in range(self.stages))


def split_layers(layers: int, links: int) -> tuple[int, ...]:
    """Layers of each link, as equal as can be; the last and the first link go short first.

    They also have the head and the embedding, as in Llama 3 (arXiv:2407.21783, section 3.3.2): 126 layers
    over 16 stages are 7, fourteen times 8, and 7. At least one layer for each link.
    """
    most = -(-layers // links)
    short = most * links - layers
    ends_first = [links - 1, 0, *range(links - 2, 0, -1)][:links] if links > 1 else [0]
    without = set(ends_first[:short])
    return tuple(most - (link in without) for link in range(links))
