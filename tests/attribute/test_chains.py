"""A transfer that a TPU chain carries belongs to who uses it, not to the product that it runs beside."""

from __future__ import annotations

from shardlab.analysis import analyze
from shardlab.attribute.chains import Chains
from shardlab.hlo.reader import parse

SCOPE = "jit(step)/jvp(layers)/while/body"


def gather(name: str, flags: tuple[int, int]) -> str:
    """One of the clones; libtpu prints no metadata on any of them."""
    first, last = flags
    return (
        f"%{name} = bf16[256,128] all-gather(%p), channel_id=1, replica_groups={{{{0,1,2,3}}}},"
        " dimensions={0},"
        ' use_global_device_ids=true, frontend_attributes={chain_id="7"}, backend_config={'
        f'"async_collective_fusion_config":{{"flag_start":"{first}","flag_end":"{last}"}}}}'
    )


# The form that libtpu prints, shortened: the gate's weight is gathered beside the attention's output product.
HLO = f"""HloModule jit_step, is_scheduled=true, num_partitions=4

%start.1 (p: bf16[64,128]) -> (bf16[64,128], bf16[256,128]) {{
  %p = bf16[64,128] parameter(0)
  {gather("ag.1", (-1, -1))}
  ROOT %c = (bf16[64,128], bf16[256,128]) custom-call(%ag.1), custom_call_target="AsyncCollectiveStart"
}}

%carry.1 (p: bf16[64,128], q: bf16[256,128], x: bf16[8,8]) -> (bf16[8,8], bf16[64,128], bf16[256,128]) {{
  %p = bf16[64,128] parameter(0)
  %q = bf16[256,128] parameter(1)
  %x = bf16[8,8] parameter(2)
  {gather("ag.2", (2, 8))}
  %d = bf16[8,8] dot(%x, %x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  ROOT %t = (bf16[8,8], bf16[64,128], bf16[256,128]) tuple(%d, %p, %ag.2)
}}

%done.1 (p: bf16[64,128], q: bf16[256,128]) -> bf16[256,128] {{
  %p = bf16[64,128] parameter(0)
  %q = bf16[256,128] parameter(1)
  {gather("ag.3", (9, 9))}
  ROOT %c = bf16[256,128] custom-call(%ag.3, %q), custom_call_target="AsyncCollectiveDone"
}}

ENTRY %main (w: bf16[64,128], x: bf16[8,8]) -> bf16[256,128] {{
  %w = bf16[64,128] parameter(0)
  %x = bf16[8,8] parameter(1)
  %start = (bf16[64,128], bf16[256,128]) fusion(%w), kind=kCustom, calls=%start.1
  %s0 = bf16[64,128] get-tuple-element(%start), index=0
  %s1 = bf16[256,128] get-tuple-element(%start), index=1
  %beside = (bf16[8,8], bf16[64,128], bf16[256,128]) fusion(%s0, %s1, %x), kind=kOutput, calls=%carry.1,
    metadata={{op_name="{SCOPE}/attention/output/dot_general"}}
  %b1 = bf16[64,128] get-tuple-element(%beside), index=1
  %b2 = bf16[256,128] get-tuple-element(%beside), index=2
  %done = bf16[256,128] fusion(%b1, %b2), kind=kCustom, calls=%done.1
  ROOT %copy = bf16[256,128] copy(%done), metadata={{op_name="{SCOPE}/mlp/gate/sharding_constraint"}}
}}
"""


def test_a_carried_gather_belongs_to_its_user() -> None:
    (row,) = analyze(HLO, axes={"x": 4}).collectives
    assert (row.layer, row.phase) == ("layers/mlp/gate", "forward")


def test_the_end_has_the_same_channel_and_chain() -> None:
    assert end_of_chain(HLO) == "done"
    assert end_of_chain(HLO.replace('chain_id="7"', 'chain_id="8"', 1)) is None


def end_of_chain(text: str) -> str | None:
    """The name of the fusion where the chain that `ag.1` starts ends."""
    (module,) = parse(text)
    start = module.computations["start.1"].instructions["ag.1"]
    end = Chains(module).end(module.computations["main"], start)
    return None if end is None else end.name
