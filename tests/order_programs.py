"""Small programs whose collectives run over named mesh axes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


def program(mesh: Mapping[str, int], *collectives: tuple[Sequence[str], int]) -> str:
    """HLO text of one all-reduce of so many bytes over each of these sets of axes."""
    lines = [
        f"  p{i} = f32[{size // 4}]{{0}} parameter({i})\n"
        f"  r{i} = f32[{size // 4}]{{0}} all-reduce(p{i}), channel_id={i + 1}, "
        f"replica_groups={groups(mesh, axes)}, use_global_device_ids=true, to_apply=add"
        for i, (axes, size) in enumerate(collectives)
    ]
    return f"""HloModule m, num_partitions={math.prod(mesh.values())}

add {{
  a = f32[] parameter(0)
  b = f32[] parameter(1)
  ROOT c = f32[] add(a, b)
}}

ENTRY main {{
{chr(10).join(lines)}
  ROOT t = tuple({", ".join(f"r{i}" for i in range(len(collectives)))})
}}
"""


def groups(mesh: Mapping[str, int], axes: Sequence[str]) -> str:
    """Replica groups in iota form: the positions that differ in these axes alone."""
    inside = [i for i, axis in enumerate(mesh) if axis in axes]
    outside = [i for i, axis in enumerate(mesh) if axis not in axes]
    size = math.prod(mesh[axis] for axis in axes)
    shape = ",".join(map(str, mesh.values()))
    transposed = ",".join(map(str, outside + inside))
    return f"[{math.prod(mesh.values()) // size},{size}]<=[{shape}]T({transposed})"
