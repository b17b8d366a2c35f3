"""What the tests of the second counter share: meshes, groups, and an entry filled by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from second_counter import Count, count
from second_counter.hand_built import CHANNEL, GLOBAL_IDS, Builder, module, v1, v2

MESH = {"data": 2, "model": 4}
DCN_MESH = {"dcn": 2, "data": 2, "model": 4}
MODEL = CHANNEL + GLOBAL_IDS + v1((0, 1, 2, 3), (4, 5, 6, 7))
MODEL_PARTITIONS = CHANNEL + v1((0, 1, 2, 3), (4, 5, 6, 7))
DATA = CHANNEL + GLOBAL_IDS + v2(4, 2, [2, 4], [1, 0])


def exactly(figures: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    return {key: (value, value) for key, value in figures.items()}


def entry_with(add: Callable[[Builder, int], object]) -> Builder:
    entry = Builder(1, "main")
    add(entry, entry.parameter())
    return entry


def count_of(
    add: Callable[[Builder, int], object], *others: Builder, mesh: Mapping[str, int] = MESH
) -> Count:
    """The count of an entry computation that `add` fills from an F32_1K; two slices if the mesh has dcn."""
    return count(module(entry_with(add), *others), 16 if "dcn" in mesh else 8, mesh)


def with_op(opcode: str, **options: object) -> Callable[[Builder, int], object]:
    return lambda b, x: b.add(opcode, operands=[x], **options)  # type: ignore[arg-type]
