"""Custom calls as jaxlib 0.12.0.1 prints them for H100 and v5e, with what FLOPs do not need taken out."""

import itertools
import json

import pytest

from shardlab.cost.flops import hardware_flops
from shardlab.cost.kernels import causal_blocks, causal_pairs, window_blocks
from shardlab.hlo.reader import parse


def call(name, shape, operands, target, rest=""):
    """A module that makes one custom call on operands of these shapes."""
    parameters = "".join(f"  %p{i} = {operand} parameter({i})\n" for i, operand in enumerate(operands))
    uses = ", ".join(f"%p{i}" for i in range(len(operands)))
    line = f'  ROOT %{name} = {shape} custom-call({uses}), custom_call_target="{target}"{rest}\n'
    (module,) = parse(f"HloModule m\n\nENTRY %main () -> f32[] {{\n{parameters}{line}}}\n")
    return hardware_flops(module)


def fmha(mask, scores, window=0):
    config = {
        "cudnn_fmha_backend_config": {
            "intermediate_tensor_shape": {"element_type": "BF16", "dimensions": [str(n) for n in scores]},
            "mask_type": mask,
            "sliding_window_length": window,
        }
    }
    return f", backend_config={json.dumps(config)}"


QKV = ["bf16[2,512,8,64]{3,2,1,0}", "bf16[2,512,2,64]{3,2,1,0}", "bf16[2,512,2,64]{3,2,1,0}"]
OUT = "(bf16[2,8,512,64]{3,1,2,0}, f32[2,8,512]{2,1,0}, u8[0]{0})"
SQUARE, TRIANGLE = 512 * 512, 512 * 513 // 2


@pytest.mark.parametrize(
    ("target", "mask", "window", "expected"),
    [
        # 2 batch · 8 heads; forward q·k and p·v over 64 each, backward five products.
        pytest.param("__cudnn$fmhaSoftmax", "NO_MASK", 0, 2 * 2 * 8 * SQUARE * 2 * 64, id="forward-full"),
        pytest.param("__cudnn$fmhaSoftmax", "CAUSAL", 0, 2 * 2 * 8 * TRIANGLE * 2 * 64, id="forward-causal"),
        pytest.param(
            "__cudnn$fmhaSoftmaxBackward", "CAUSAL", 0, 2 * 2 * 8 * TRIANGLE * 5 * 64, id="backward-causal"
        ),
        pytest.param(
            "__cudnn$fmhaSoftmax", "CAUSAL", 1, 2 * 2 * 8 * 512 * 2 * 64, id="window-of-the-diagonal"
        ),
    ],
)
def test_cudnn_attention(target, mask, window, expected):
    flops = call("attention", OUT, QKV, target, fmha(mask, (2, 8, 512, 512), window))
    assert (flops.matmul, flops.attention, flops.unknown) == (0, expected, ())
    assert len(flops.notes) == (mask == "CAUSAL")


MASK = "s8[1,4,4]{2,1,0}"
POSITIONS = "s32[512,128]{1,0}"
SEGMENTS = ["s32[512,128]{1,0}", "s32[8,512]{1,0}"]
Q, KV = "bf16[2,4,512,128]{3,2,1,0}", "bf16[2,512,128]{2,1,0}"
LSE, DO = "f32[2,4,8,512]{3,2,1,0}", Q
CAUSAL_TILES = 10 * 128 * 128  # of 4 x 4 tiles of 128 x 128, ten touch or lie below the diagonal
HEADS = 2 * 4


@pytest.mark.parametrize(
    ("name", "shape", "operands", "expected"),
    [
        pytest.param(
            "splash_mqa_fwd_residuals.1",
            f"({Q}, f32[2,4,512,128]{{3,2,1,0}})",
            [MASK, MASK, Q, KV, KV, POSITIONS],
            2 * HEADS * CAUSAL_TILES * 2 * 128,
            id="forward",
        ),
        pytest.param(
            "splash_mqa_dq_no_residuals.1",
            Q,
            [MASK, MASK, Q, KV, KV, LSE, DO, LSE, POSITIONS],
            2 * HEADS * CAUSAL_TILES * 3 * 128,
            id="dq",
        ),
        pytest.param(
            "splash_mqa_dkv_no_residuals.1",
            f"({KV}, {KV})",
            [MASK, MASK, Q, KV, KV, LSE, DO, LSE, POSITIONS],
            2 * HEADS * CAUSAL_TILES * 4 * 128,
            id="dkv",
        ),
        pytest.param(
            "splash_mqa_dkv_no_residuals.1",
            f"({Q}, {KV}, {KV})",
            [MASK, MASK, Q, KV, KV, LSE, DO, LSE, POSITIONS],
            2 * HEADS * CAUSAL_TILES * 5 * 128,
            id="fused-backward",
        ),
        pytest.param(
            "splash_mqa_fwd_residuals.1",
            f"({Q}, f32[2,4,512,128]{{3,2,1,0}})",
            [MASK, MASK, Q, KV, KV],
            2 * HEADS * SQUARE * 2 * 128,
            id="full-mask",
        ),
        pytest.param(
            "splash_mqa_fwd_residuals.1",
            f"({Q}, f32[2,4,512,128]{{3,2,1,0}})",
            [MASK, MASK, Q, KV, KV, *SEGMENTS],
            2 * HEADS * SQUARE * 2 * 128,
            id="segment-ids-are-not-positions",
        ),
        pytest.param(
            "splash_mqa_fwd_residuals.1",
            f"({Q}, f32[2,4,512,128]{{3,2,1,0}})",
            [MASK, MASK, Q, KV, KV, *SEGMENTS, POSITIONS],
            2 * HEADS * CAUSAL_TILES * 2 * 128,
            id="segment-ids-and-positions",
        ),
    ],
)
def test_splash_attention(name, shape, operands, expected):
    flops = call(name, shape, operands, "tpu_custom_call")
    assert (flops.matmul, flops.attention, flops.unknown) == (0, expected, ())


@pytest.mark.parametrize(
    ("name", "shape", "mask", "rest", "products"),
    [
        pytest.param(
            "splash_mqa_fwd_residuals.1",
            f"({Q}, f32[2,4,512,128]{{3,2,1,0}})",
            "s8[1,4,2]{2,1,0}",
            [],
            2,
            id="forward",
        ),
        pytest.param(
            "splash_mqa_dkv_no_residuals.1", f"({KV}, {KV})", "s8[1,2,4]{2,1,0}", [LSE, DO, LSE], 4, id="dkv"
        ),
    ],
)
def test_a_splash_window_is_in_the_name(name, shape, mask, rest, products):
    """The grid has two blocks beside each of the four: 4 + 3 tiles of 128 hold pairs less than 129 apart."""
    scope = ', metadata={op_name="jit(f)/splash_window129/pallas_call"}'
    flops = call(name, shape, [mask, mask, Q, KV, KV, *rest, POSITIONS], "tpu_custom_call", scope)
    assert flops.attention == 2 * HEADS * 7 * 128 * 128 * products * 128
    assert (flops.unknown, flops.notes) == ((), (flops.notes[0],))
    assert "a window of 129" in flops.notes[0]


def gemm(lhs_contracting):
    numbers = {"lhs_contracting_dimensions": [str(d) for d in lhs_contracting]}
    return f", backend_config={json.dumps({'gemm_backend_config': {'dot_dimension_numbers': numbers}})}"


@pytest.mark.parametrize(
    ("target", "shape", "operands", "rest", "expected"),
    [
        pytest.param(
            "__cublas$lt$matmul",
            "(bf16[2,256,1024]{2,1,0}, s8[4194304]{0})",
            ["bf16[2,256,512]{2,1,0}", "bf16[2,512,1024]{2,1,0}"],
            gemm([2]),
            2 * 2 * 256 * 512 * 1024,
            id="batched-with-workspace",
        ),
        pytest.param(
            "__cublas$gemm",
            "f32[128,1024]{1,0}",
            ["f32[512,128]{1,0}", "f32[512,1024]{1,0}"],
            gemm([0]),
            2 * 128 * 512 * 1024,
            id="transposed-left-side",
        ),
        # Scales of both sides and of the result follow (XLA: gemm_rewriter_test.cc).
        pytest.param(
            "__cublas$lt$matmul$f8",
            "(f32[16,24]{1,0}, s8[33554432]{0})",
            ["f8e4m3fn[16,32]{1,0}", "f8e4m3fn[24,32]{1,0}", "f32[]", "f32[]", "f32[]"],
            gemm([1]),
            2 * 16 * 24 * 32,
            id="f8-with-scales",
        ),
    ],
)
def test_cublas(target, shape, operands, rest, expected):
    flops = call("gemm", shape, operands, target, rest)
    assert (flops.matmul, flops.attention, flops.unknown) == (expected, 0, ())


X, KERNEL, Y = "bf16[2,32,32,16]{3,2,1,0}", "bf16[32,3,3,16]{3,2,1,0}", "bf16[2,32,32,32]{3,2,1,0}"
# SAME 3x3 on 32x32: along each dimension 3 · 32 positions less the 2 that meet padding.
CONVOLUTION = 2 * 2 * 16 * 32 * (3 * 32 - 2) ** 2


@pytest.mark.parametrize(
    ("target", "result", "operands"),
    [
        ("__cudnn$convForward", Y, [X, KERNEL]),
        ("__cudnn$convBackwardInput", X, [Y, KERNEL]),
        ("__cudnn$convBackwardFilter", KERNEL, [X, Y]),
    ],
)
def test_cudnn_convolution_does_the_same_work_in_all_directions(target, result, operands):
    window = ", window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f"
    assert call("conv", f"({result}, u8[0]{{0}})", operands, target, window).matmul == CONVOLUTION


@pytest.mark.parametrize(
    ("name", "target", "operands", "rest"),
    [
        pytest.param("gmm.1", "tpu_custom_call", [Q, KV], "", id="another-pallas-kernel"),
        pytest.param("splash_mha.1", "tpu_custom_call", [MASK, Q, KV, KV], "", id="splash-of-unknown-part"),
        pytest.param("splash_mha_fwd.1", "tpu_custom_call", [MASK, Q], "", id="splash-without-keys"),
        pytest.param(
            "splash_mha_fwd.1", "tpu_custom_call", ["s8[1,0,4]", Q, Q, Q], "", id="splash-empty-mask"
        ),
        pytest.param("attention", "__cudnn$fmhaSoftmax", QKV, "", id="cudnn-without-config"),
        pytest.param("gemm", "__cublas$lt$matmul", QKV, "", id="cublas-without-config"),
        pytest.param("gemm", "__cublas$lt$matmul", QKV, gemm(["x"]), id="cublas-with-a-broken-config"),
        pytest.param("gemm", "__cublas$lt$matmul", QKV, gemm([9]), id="cublas-with-a-wrong-dimension"),
        pytest.param("conv", "__cudnn$convForward", [X], "", id="convolution-without-kernel"),
        pytest.param("solve", "lapack_sgetrf", [X], "", id="solver"),
    ],
)
def test_opaque_kernels_are_listed_and_not_zero_silently(name, target, operands, rest):
    flops = call(name, "bf16[8]", operands, target, rest)
    assert flops.total == 0
    (unknown,) = flops.unknown
    assert (unknown.name, unknown.what) == (name, target)
    assert unknown.why


def test_calls_that_only_move_data_are_not_listed():
    assert call("start", "bf16[8]", [X], "AsyncCollectiveStart").unknown == ()


@pytest.mark.parametrize("window", [0, 1, 2, 5, 100])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 7), (8, 3), (3, 8)])
def test_causal_pairs_against_every_pair(queries, keys, window):
    pairs = itertools.product(range(queries), range(keys))
    allowed = sum(k <= q and (not window or q - k < window) for q, k in pairs)
    assert causal_pairs(queries, keys, window) == allowed


@pytest.mark.parametrize("window", [1, 2, 4, 5, 6, 12, 99])
@pytest.mark.parametrize("blocks", [1, 3, 4])
def test_window_blocks_against_every_pair(blocks, window):
    tile = 4
    length = blocks * tile
    tiles = {
        (q // tile, k // tile) for q, k in itertools.product(range(length), repeat=2) if k <= q < k + window
    }
    assert window_blocks(blocks, tile, window) == len(tiles)


@pytest.mark.parametrize(("query_blocks", "key_blocks"), [(1, 1), (4, 4), (2, 4), (4, 2), (3, 6)])
def test_causal_blocks_against_every_pair(query_blocks, key_blocks):
    length = 12
    tiles = {
        (q * query_blocks // length, k * key_blocks // length)
        for q, k in itertools.product(range(length), repeat=2)
        if k <= q
    }
    assert causal_blocks(query_blocks, key_blocks) == len(tiles)
