"""Instruction names are unique in a computation only: an inner loop may repeat all names of the outer."""

from __future__ import annotations

import shardlab

LOOP = """
%{which}_body (s: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %s = (s32[], f32[8]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[8]{{0}} get-tuple-element(%s), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %y = f32[8]{{0}} {work}
  ROOT %t = (s32[], f32[8]{{0}}) tuple(%next, %y)
}}

%{which}_condition (s: (s32[], f32[8])) -> pred[] {{
  %s = (s32[], f32[8]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %limit = s32[] constant({trips})
  ROOT %p = pred[] compare(%i, %limit), direction=LT
}}

{entry}%{which} (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  %zero = s32[] constant(0)
  %s = (s32[], f32[8]{{0}}) tuple(%zero, %x)
  %loop = (s32[], f32[8]{{0}}) while(%s), condition=%{which}_condition, body=%{which}_body
  ROOT %y = f32[8]{{0}} get-tuple-element(%loop), index=1
}}
"""
ADD = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}
"""
REDUCE = "all-reduce(%x), channel_id=1, replica_groups=[1,8]<=[8], use_global_device_ids=true, to_apply=%add"


def test_a_loop_that_calls_a_loop_of_the_same_names() -> None:
    """3 trips that each call what makes 5: 15."""
    inner = LOOP.format(which="inner", work=REDUCE, trips=5, entry="")
    outer = LOOP.format(which="outer", work="call(%x), to_apply=%inner", trips=3, entry="ENTRY ")
    (row,) = shardlab.analyze("HloModule m, num_partitions=8\n" + ADD + inner + outer, {"all": 8}).collectives
    assert row.executions == (15, 15)
