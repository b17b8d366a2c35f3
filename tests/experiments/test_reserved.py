"""What PyTorch's allocator reserves of torchtitan's steps: by hand, and by replaying best fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
from validation.gpu_rows import torchtitan
from validation.memory import Reserved, layer_temporaries
from validation.row import Row

from shardlab.hardware.catalog import load_machine
from shardlab.program import Program

ROWS = {int(row.row.split(":")[0]): row for row in torchtitan()}
# Llama 3 8B: elements of a layer's kernels and norms, of embedding and head, of the final norm.
KERNELS, NORMS = 2 * 4_096 * 4_096 + 2 * 4_096 * 1_024 + 3 * 4_096 * 14_336, 2 * 4_096
TABLE = 128_256 * 4_096
TOTAL = 32 * (KERNELS + NORMS) + 2 * TABLE + 4_096
ROOT, LAYER = 2 * (2 * TABLE + 4_096), 2 * (KERNELS + NORMS)
TOKENS = 2 * 8_192


class BestFit:
    """One segment that grows at its end: the smallest free block that fits, split; neighbours join again."""

    def __init__(self) -> None:
        self.free: list[tuple[int, int]] = []  # (start, size)
        self.end = 0
        self.sizes: dict[int, int] = {}

    def take(self, size: int) -> int:
        fitting = [block for block in self.free if block[1] >= size]
        if fitting:
            block = min(fitting, key=lambda block: block[1])
            self.free.remove(block)
            start, had = block
            if had > size:
                self.free.append((start + size, had - size))
        else:
            tail = next((block for block in self.free if sum(block) == self.end), None)
            start = self.end if tail is None else tail[0]
            if tail is not None:
                self.free.remove(tail)
            self.end = start + size
        self.sizes[start] = size
        return start

    def give(self, start: int) -> None:
        self.free.append((start, self.sizes.pop(start)))
        self.free.sort()
        joined: list[tuple[int, int]] = []
        for block in self.free:
            if joined and sum(joined[-1]) == block[0]:
                joined[-1] = joined[-1][0], joined[-1][1] + block[1]
            else:
                joined.append(block)
        self.free = joined


def of_whole_vocabulary() -> int:
    """F.cross_entropy(logits.float()), forward and backward, in units of the 16-bit logits."""
    memory = BestFit()
    logits, wide = memory.take(1), memory.take(2)
    log_p = memory.take(2)
    memory.give(wide)
    memory.give(logits)
    of_log_p, of_wide = memory.take(2), memory.take(2)
    for one in (log_p, of_log_p, of_wide):
        memory.give(one)
    return memory.end


def of_split_vocabulary() -> int:
    """DTensor's loss_parallel, in the same units."""
    memory = BestFit()
    logits, wide, shifted = memory.take(1), memory.take(2), memory.take(2)
    memory.give(memory.take(2))  # exp(shifted)
    log_p = memory.take(2)
    for one in (shifted, wide, logits):
        memory.give(one)
    picked, exponential = memory.take(2), memory.take(2)
    total = memory.take(2)
    memory.give(exponential)
    product = memory.take(2)
    for one in (log_p, picked, total, product):
        memory.give(one)
    return memory.end


def test_a_loss_leaves_the_blocks_that_best_fit_leaves() -> None:
    """What `_loss_blocks` multiplies the f32 logits by, replayed."""
    assert (of_whole_vocabulary() / 2, of_split_vocabulary() / 2) == (3.5, 4.5)


def reserved(row: Row) -> Reserved:
    assert row.reserved is not None
    return row.reserved


def test_eight_gpus_of_llama_3_8b() -> None:
    """f32 shards of all gradients; embedding, norm and head, and a layer, twice, of which our program has
    the head; three and a half f32 logits. In fp8 a layer's kernels take one byte; eager layers keep what
    nothing reads."""
    logits = 4 * TOKENS * 128_256
    compiled = 4 * TOTAL / 8 + 2 * (ROOT + LAYER) - 2 * TABLE + 3.5 * logits
    assert reserved(ROWS[2]).size_bytes == pytest.approx(compiled, rel=1e-6)
    assert reserved(ROWS[3]).size_bytes == pytest.approx(compiled - 2 * (KERNELS + NORMS), rel=1e-6)
    assert reserved(ROWS[1]).size_bytes == pytest.approx(compiled + 32 * 2 * TOKENS * 4_096, rel=1e-6)


def test_a_compiled_loss_has_one_gradient_in_16_bits() -> None:
    """H200s in 2025: 32 GPUs, fp8, and the head that ours no longer holds."""
    expected = 4 * TOTAL / 32 + 2 * (ROOT + LAYER / 2) + 2 * TOKENS * 128_256
    assert reserved(ROWS[31]).size_bytes == pytest.approx(expected, rel=1e-6)


def test_a_split_vocabulary_and_its_gathered_input() -> None:
    """70B on 32 x 8 GPUs: 16 sequences on each group of eight; what is split over eight is an eighth, but
    for the norms."""
    tokens, embed, table = 16 * 8_192, 8_192, 128_256 * 8_192
    kernels = 2 * embed * embed + 2 * embed * 1_024 + 3 * embed * 28_672
    total = 80 * kernels + 2 * table
    logits = 4 * tokens * 128_256 / 8
    expected = 4 * total / 256 + 2 * (4 * table + kernels) / 8 - 2 * table / 8
    expected += 4.5 * logits + 2 * tokens * embed
    assert reserved(ROWS[11]).size_bytes == pytest.approx(expected, rel=2e-4)


def test_a_stage_holds_shards_in_f32_and_itself_in_8_bits() -> None:
    """405B: a stage of 126 / 8 layers (16 on the fullest, which our arrays have everywhere) and one table."""
    embed, mlp = 16_384, 53_248
    layer = (2 * embed * embed + 2 * embed * 1_024 + 3 * embed * mlp) / 8
    stage = 16 * layer + 128_256 * embed / 8
    expected = stage * (4 / 8 + 1 + 4 / 8) + layer
    assert reserved(ROWS[13]).instead_of == ("parameters",)
    assert reserved(ROWS[13]).size_bytes == pytest.approx(expected, rel=0.01)


LOOPS = """\
HloModule jit_train_step, is_scheduled=true

forward {
  state = (s32[], f32[256]{0}) parameter(0)
  i = s32[] get-tuple-element(state), index=0
  x = f32[256]{0} get-tuple-element(state), index=1
  wide = f32[1024]{0} pad(x), metadata={op_name="jit(train_step)/jvp(layers)/while/body/pad"}
  half = f32[512]{0} slice(wide), metadata={op_name="jit(train_step)/jvp(layers)/while/body/slice"}
  y = f32[256]{0} slice(half), metadata={op_name="jit(train_step)/jvp(layers)/while/body/slice"}
  ROOT next = (s32[], f32[256]{0}) tuple(i, y)
}

backward {
  state = (s32[], f32[256]{0}) parameter(0)
  i = s32[] get-tuple-element(state), index=0
  x = f32[256]{0} get-tuple-element(state), index=1
  wider = f32[4096]{0} pad(x), metadata={op_name="jit(train_step)/transpose(jvp(layers))/while/body/pad"}
  y = f32[256]{0} slice(wider), metadata={op_name="jit(train_step)/transpose(jvp(layers))/while/body/slice"}
  ROOT next = (s32[], f32[256]{0}) tuple(i, y)
}

ends {
  state = (s32[], f32[256]{0}) parameter(0)
  i = s32[] get-tuple-element(state), index=0
  n = s32[] constant(4)
  ROOT less = pred[] compare(i, n), direction=LT
}

ENTRY e {
  p = (s32[], f32[256]{0}) parameter(0)
  f = (s32[], f32[256]{0}) while(p), condition=ends, body=forward, \
metadata={op_name="jit(train_step)/jvp(layers)/while"}
  ROOT b = (s32[], f32[256]{0}) while(f), condition=ends, body=backward, \
metadata={op_name="jit(train_step)/transpose(jvp(layers))/while"}
}
"""


def test_temporaries_of_a_layer_are_those_of_the_forward_loop() -> None:
    """`wide` and `half` of 4,096 and 2,048 bytes live together; the backward loop has 16,384."""
    program = Program(name="m", backend="gpu", hlo_text=LOOPS, num_devices=1)
    assert layer_temporaries(program, load_machine("h100:1x1")) == 4_096 + 2_048
    alone = "HloModule m, is_scheduled=true\n\nENTRY e {\n  ROOT p = f32[2]{0} parameter(0)\n}\n"
    assert layer_temporaries(replace(program, hlo_text=alone), load_machine("h100:1x1")) is None
