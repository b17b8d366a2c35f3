import itertools

import jax
import jax.numpy as jnp
import pytest

from shardlab.cost.flops import hardware_flops
from shardlab.cost.products import NotCountedError, WindowDim, valid_positions, window_dims
from shardlab.hlo.reader import parse


def by_hand(input_extent, output_extent, window):
    """Look at every pair: an independent, slow count."""
    total = 0
    for o, k in itertools.product(range(output_extent), range(window.size)):
        base = o * window.stride + k * window.window_dilation - window.pad_low
        total += base % window.base_dilation == 0 and 0 <= base // window.base_dilation < input_extent
    return total


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("base_dilation", [1, 2, 3, 6])
@pytest.mark.parametrize("window_dilation", [1, 2, 5])
@pytest.mark.parametrize("pad_low", [-2, 0, 1, 7])
def test_valid_positions_against_every_pair(stride, base_dilation, window_dilation, pad_low):
    for size, input_extent, output_extent in itertools.product((1, 3, 4), (1, 5, 8), (1, 6, 9)):
        window = WindowDim(
            size=size,
            stride=stride,
            pad_low=pad_low,
            base_dilation=base_dilation,
            window_dilation=window_dilation,
        )
        expected = by_hand(input_extent, output_extent, window)
        assert valid_positions(input_extent, output_extent, window) == expected, (
            window,
            input_extent,
            output_extent,
        )


def test_an_empty_input_does_no_work():
    assert valid_positions(0, 4, WindowDim(size=3, pad_low=1)) == 0


CONVOLUTIONS = {
    "same": {"window_strides": (1, 1), "padding": "SAME"},
    "strided": {"window_strides": (2, 3), "padding": "VALID"},
    "padded": {"window_strides": (1, 2), "padding": ((2, 1), (0, 3))},
    "transposed": {"window_strides": (1, 1), "padding": ((1, 1), (2, 2)), "lhs_dilation": (2, 3)},
    "dilated-kernel": {"window_strides": (1, 1), "padding": "SAME", "rhs_dilation": (2, 2)},
}


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions_agree_with_xla(case, groups):
    x_BxHxWxC = jax.ShapeDtypeStruct((2, 12, 10, 8), jnp.float32)
    kernel_HxWxCxF = jax.ShapeDtypeStruct((3, 3, 8 // groups, 16), jnp.float32)

    def convolve(x_BxHxWxC, kernel_HxWxCxF):
        return jax.lax.conv_general_dilated(
            x_BxHxWxC,
            kernel_HxWxCxF,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
            **CONVOLUTIONS[case],
        )

    compiled = jax.jit(convolve).lower(x_BxHxWxC, kernel_HxWxCxF).compile()
    (module,) = parse(compiled.as_text())
    flops = hardware_flops(module)
    assert flops.unknown == ()
    assert flops.matmul == compiled.cost_analysis()["flops"]


def one(instruction, lhs, rhs):
    text = f"HloModule m\n\nENTRY %main (a: {lhs}, b: {rhs}) -> f32[] {{\n  %a = {lhs} parameter(0)\n"
    text += f"  %b = {rhs} parameter(1)\n  ROOT %r = {instruction}\n}}\n"
    (module,) = parse(text)
    return hardware_flops(module)


@pytest.mark.parametrize(
    ("instruction", "lhs", "rhs", "flops"),
    [
        # As libtpu prints them (v5e, tpu7x): matrix products are convolutions.
        pytest.param(
            "bf16[64,1024]{1,0} convolution(%a, %b), dim_labels=bf_io->bf",
            "bf16[64,512]{1,0}",
            "bf16[512,1024]{1,0}",
            2 * 64 * 512 * 1024,
            id="tpu-product",
        ),
        pytest.param(
            "bf16[2,256,1024]{2,1,0} convolution(%a, %b), "
            "window={size=2 lhs_dilate=2}, dim_labels=0bf_0io->0bf",
            "bf16[2,256,512]{2,1,0}",
            "bf16[2,512,1024]{2,1,0}",
            2 * 2 * 256 * 512 * 1024,
            id="tpu-batched-product",
        ),
        pytest.param(
            "bf16[2,4,256,128]{3,2,1,0} convolution(%a, %b), "
            "window={size=2x4 stride=1x3 lhs_dilate=2x4}, dim_labels=0b1f_0o1i->01bf",
            "bf16[2,256,4,64]{3,2,1,0}",
            "bf16[2,128,4,64]{3,2,1,0}",
            2 * (2 * 4) * 256 * 128 * 64,
            id="tpu-attention-scores-two-batch-dimensions",
        ),
        pytest.param(
            "bf16[2048,512,1]{1,0,2} convolution(%a, %b), window={size=2}, dim_labels=0fb_o0i->bf0",
            "bf16[2,64,2048]{2,1,0}",
            "bf16[512,2,64]{2,1,0}",
            2 * 2048 * 512 * (2 * 64),
            id="tpu-two-contracting-dimensions",
        ),
        pytest.param(
            "f32[4,128,1024]{2,1,0} dot(%a, %b), lhs_batch_dims={1}, lhs_contracting_dims={2}, "
            "rhs_batch_dims={0}, rhs_contracting_dims={1}",
            "bf16[128,4,128]{2,1,0}",
            "bf16[4,128,1024]{2,1,0}",
            2 * 128 * (4 * 128) * 1024,
            id="gpu-split-k",
        ),
        pytest.param(
            "f32[] dot(%a, %b), lhs_contracting_dims={0}, rhs_contracting_dims={0}",
            "f32[7]",
            "f32[7]",
            14,
            id="inner",
        ),
    ],
)
def test_products(instruction, lhs, rhs, flops):
    assert one(instruction, lhs, rhs).matmul == flops


@pytest.mark.parametrize(
    ("instruction", "why"),
    [
        ("f32[4] dot(%a, %b), lhs_contracting_dims={3}, rhs_contracting_dims={0}", "rank 1"),
        ("f32[4] dot(%gone, %b), lhs_contracting_dims={0}, rhs_contracting_dims={0}", "not an array"),
        ("f32[?] dot(%a, %b), lhs_contracting_dims={0}, rhs_contracting_dims={0}", "unbounded"),
        ("f32[4] convolution(%a, %b)", "labels"),
        ("f32[4] convolution(%a, %b), dim_labels=bf_io->bf", "rank 1"),
        ("f32[4] convolution(%a, %b), dim_labels=b_i->b", "without dimension 'f'"),
        ("f32[4] ragged-dot(%a, %b), lhs_contracting_dims={0}", "ragged-dot"),
    ],
)
def test_what_cannot_be_counted_is_listed(instruction, why):
    flops = one(instruction, "f32[4]", "f32[4]")
    assert flops.matmul == 0
    (unknown,) = flops.unknown
    assert unknown.name == "r"
    assert why in unknown.why


@pytest.mark.parametrize(
    "text", ["{size=2}", "{size=2x2 stride=1}", "{size=0x1}", "", "{size=2x2 pad=_1x1_1}"]
)
def test_broken_windows(text):
    with pytest.raises(NotCountedError, match="window"):
        window_dims(text, 2)
