"""Winograd's filtering of the filters that a mask keeps, against PyTorch's convolution in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.convolution_cases import LAYOUTS, block_mask
from helpers.tolerances import assert_close, assert_equal
from helpers.written_passes import random_gate
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from sparse_adv import ops
from sparse_adv.ops.masked_winograd_conv2d import live_filters

SIZES = {  # rows of tiles that are joined, that are joined with tiles to fill vectors, that are not; one pixel
    "16 x 32": (16, 32),
    "5 x 28": (5, 28),
    "9 x 25": (9, 25),
    "8 x 8": (8, 8),
    "4 x 4": (4, 4),
    "7 x 7": (7, 7),
    "6 x 10": (6, 10),
    "1 x 1": (1, 1),
}
BLOCKS = {"1": (1, 1, 3, 3), "2": (2, 2, 3, 3), "4": (4, 4, 3, 3), "8 x 1": (8, 1, 3, 3), "taps": (2, 3, 1, 1)}


def operands(size, block=(2, 2, 3, 3), images=3, out=10, into=6, density=0.4):
    """Images, weight, mask and pattern."""
    mask = block_mask((out, into, 3, 3), block, density)
    x, weight = torch.randn(images, into, *size), torch.randn(out, into, 3, 3)
    return x, weight, mask, ops.compile_pattern(mask, block)


def exact(x, weight, mask, bias=None, padding=1):
    bias = None if bias is None else bias.double()
    return F.conv2d(x.double(), weight.double() * mask, bias, padding=padding)


def convolve(x, weight, pattern, bias=None, padding=(1, 1), transposed=False, **epilogue):
    live = ops.masked_winograd_conv2d_weight(weight, pattern, transposed=transposed)
    rows, cols = (size + 2 * zeros - 2 for size, zeros in zip(x.shape[2:], padding, strict=True))
    out = torch.full((len(x), weight.shape[1 if transposed else 0], rows, cols), math.nan)
    ops.masked_winograd_conv2d_out(x, live, bias, padding, out=out, **epilogue)
    return out


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_both_passes_are_those_of_pytorch(size, block):
    x, weight, mask, pattern = operands(size, block)
    bias = torch.randn(len(weight))
    assert_close(convolve(x, weight, pattern, bias), exact(x, weight, mask, bias))
    grad = torch.randn(len(x), len(weight), *size)
    expected = F.conv_transpose2d(grad.double(), weight.double() * mask, padding=1)
    assert_close(convolve(grad, weight, pattern, transposed=True), expected)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_relu_and_gates(size, with_residual):
    x, weight, mask, pattern = operands(size)
    sums = exact(x, weight, mask)
    residual = torch.randn(sums.shape) if with_residual else None
    expected = sums if residual is None else sums + residual
    gate = ops.empty_gate(sums.float()).fill_(0xAA)
    out = convolve(x, weight, pattern, residual=residual, relu=True, gate_out=gate)
    assert_close(out, expected.relu())
    assert_equal(ops.gate_to_bool(gate, out), out > 0)
    gate = random_gate(out)
    gated = convolve(x, weight, pattern, residual=residual, gate=gate)
    assert_close(gated, expected.where(ops.gate_to_bool(gate, out), 0))


def test_the_residual_may_be_the_output():
    x, weight, mask, pattern = operands((8, 12))
    out = torch.randn(3, 10, 8, 12)
    expected = exact(x, weight, mask) + out
    ops.masked_winograd_conv2d_out(x, ops.masked_winograd_conv2d_weight(weight, pattern), residual=out, out=out)
    assert_close(out, expected)


@pytest.mark.parametrize("padding", [(0, 0), (2, 2), (0, 2), (2, 1)])
def test_padding(padding):
    x, weight, mask, pattern = operands((6, 17))
    assert_close(convolve(x, weight, pattern, padding=padding), exact(x, weight, mask, padding=padding))


@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    images=st.integers(0, 5),
    channels=st.tuples(st.integers(1, 18), st.integers(1, 9)),
    block=st.tuples(st.sampled_from([1, 2, 3, 4, 8]), st.sampled_from([1, 2, 4]), st.sampled_from([1, 3])),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    threads=st.integers(1, 3),
)
def test_any_size(size, images, channels, block, density, threads):
    bo, bi, taps = block
    x, weight, mask, pattern = operands(size, (bo, bi, taps, taps), images, *channels, density)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_close(convolve(x, weight, pattern), exact(x, weight, mask))
    finally:
        torch.set_num_threads(before)


def test_many_channels_in_several_panels():
    x, weight, mask, pattern = operands((9, 16), (4, 4, 3, 3), images=2, out=260, into=300, density=0.1)
    assert_close(convolve(x, weight, pattern), exact(x, weight, mask))


@pytest.mark.parametrize("transposed", [False, True])
def test_pruned_entries_are_not_read(transposed):
    x, weight, _, pattern = operands((8, 8), out=6, into=6)
    expected = convolve(x, weight, pattern, transposed=transposed)
    for value in (math.nan, math.inf, 7.0):
        assert_equal(convolve(x, weight.where(pattern.mask, value), pattern, transposed=transposed), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_in_any_layout(layout):
    _, weight, _, pattern = operands((8, 8))
    for transposed in (False, True):
        expected = ops.masked_winograd_conv2d_weight(weight, pattern, transposed=transposed)
        assert_equal(
            ops.masked_winograd_conv2d_weight(LAYOUTS[layout](weight), pattern, transposed=transposed), expected
        )


def test_results_depend_neither_on_the_threads_nor_on_the_other_images():
    x, weight, _, pattern = operands((16, 16), (4, 4, 3, 3), images=9, out=40, into=40)
    before, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(convolve(x, weight, pattern))
    torch.set_num_threads(before)
    assert_equal(results[1], results[0])
    assert_equal(results[2], results[0])
    assert_equal(convolve(x[4:7], weight, pattern), results[0][4:7])


def test_a_nan_reaches_at_most_its_tile_and_never_vanishes():
    x, weight, _, pattern = operands((12, 12), density=1.0)
    x[0, 1, 5, 5] = math.nan
    expected, actual = F.conv2d(x, weight, padding=1), convolve(x, weight, pattern)
    assert actual[expected.isnan()].isnan().all()
    assert actual[:, :, 8:].isfinite().all() and actual[:, :, :, 8:].isfinite().all() and actual[1:].isfinite().all()


def test_filters_that_keep_a_weight_are_live():
    mask = torch.zeros(6, 4, 3, 3, dtype=torch.bool)
    mask[1, 2, 0, 1] = mask[5, 0] = True
    filters = live_filters(ops.compile_pattern(mask, (1, 1)))
    assert filters.row_offsets.tolist() == [0, 0, 1, 1, 1, 1, 2] and filters.channels.tolist() == [2, 0]
    mask[0, 2, 0, 1] = mask[4, 0] = True
    pattern = ops.compile_pattern(mask, (2, 1))
    filters, transposed = live_filters(pattern), live_filters(pattern, transposed=True)
    assert filters.oc_block == 2 and filters.row_offsets.tolist() == [0, 1, 1, 2]
    assert transposed.oc_block == 1 and transposed.channels.tolist() == [4, 5, 0, 1]


def test_opcheck():
    x, weight, mask, pattern = operands((4, 6))
    operators, live = torch.ops.sparse_adv, ops.masked_winograd_conv2d_weight(weight, pattern)
    filters = live_filters(pattern, transposed=True)
    torch.library.opcheck(operators.masked_winograd_conv2d_weight, (weight, mask, *filters, True))
    out = torch.empty(3, 10, 4, 6)
    rest = [1, 1], torch.randn(10), torch.randn(3, 10, 4, 6), True, None, out, ops.empty_gate(out)
    torch.library.opcheck(operators.masked_winograd_conv2d_out, (x, *live, *rest))


def test_operations_are_those_of_the_filters_that_are_kept():
    x, weight, mask, pattern = operands((8, 8))
    out, live = torch.empty(3, 10, 8, 8), ops.masked_winograd_conv2d_weight(weight, pattern)
    with FlopCounterMode(display=False) as counter:
        ops.masked_winograd_conv2d_out(x, live, out=out)
    assert counter.get_total_flops() == 2 * int(mask.sum()) * 3 * 8 * 8


def test_a_written_tensor_gets_a_new_version():
    x, weight, _, pattern = operands((8, 8))
    out = torch.zeros(3, 10, 8, 8)
    product = torch.ones(1, requires_grad=True) * out
    ops.masked_winograd_conv2d_out(x, ops.masked_winograd_conv2d_weight(weight, pattern), out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


X, WEIGHT, MASK, PATTERN = operands((6, 7))
LIVE, OUT = ops.masked_winograd_conv2d_weight(WEIGHT, PATTERN), torch.zeros(3, 10, 6, 7)
COUNT = len(LIVE.channels)
BAD = {
    "input's dtype": ({"input": X.double()}, RuntimeError, "input must be float32, got Double"),
    "channels_last": (
        {"input": X.contiguous(memory_format=torch.channels_last)},
        RuntimeError,
        "input must be contiguous, got strides",
    ),
    "out's layout": ({"out": OUT.contiguous(memory_format=torch.channels_last)}, RuntimeError, "out must be contig"),
    "out's size": ({"out": OUT[:, :, :5].contiguous()}, RuntimeError, r"out must have size \[3, 10, 6, 7\]"),
    "a tensor as weight": ({"weight": WEIGHT}, TypeError, "weight must be what masked_winograd_conv2d_weight returned"),
    "other channels": ({"input": X[:, :3].contiguous()}, RuntimeError, "channels must be from 0 to 2"),
    "other outputs": ({"out": OUT[:, :7].contiguous()}, RuntimeError, r"row_offsets must have size \[5\], got \[6\]"),
    "offsets' dtype": (
        {"weight": LIVE._replace(row_offsets=LIVE.row_offsets.long())},
        RuntimeError,
        "row_offsets must be int32, got Long",
    ),
    "offsets beyond the end": (
        {"weight": LIVE._replace(row_offsets=LIVE.row_offsets + 1)},
        RuntimeError,
        f"row_offsets must ascend from 0 to the number of channels, {COUNT}",
    ),
    "offsets that descend": (
        {
            "weight": LIVE._replace(
                row_offsets=LIVE.row_offsets.flip(0) * 0 + torch.tensor([0, COUNT, 0, 0, 0, COUNT]).int()
            )
        },
        RuntimeError,
        "row_offsets must ascend",
    ),
    "the last but one offset beyond the end": (
        {
            "weight": LIVE._replace(
                row_offsets=LIVE.row_offsets * 0 + torch.tensor([0, 0, 0, 0, 50_000_000, COUNT]).int()
            )
        },
        RuntimeError,
        "row_offsets must ascend",
    ),
    "channels beyond the end": (
        {"weight": LIVE._replace(channels=LIVE.channels + 6)},
        RuntimeError,
        "channels must be from 0 to 5",
    ),
    "negative channels": ({"weight": LIVE._replace(channels=LIVE.channels - 6)}, RuntimeError, "channels must be from"),
    "values' size": (
        {"weight": LIVE._replace(values=LIVE.values[:, 1:].contiguous())},
        RuntimeError,
        r"values must have size",
    ),
    "values' block": (
        {"weight": LIVE._replace(values=torch.zeros(36, COUNT, 3))},
        RuntimeError,
        "oc_block must be 1, 2 or 4, got 3",
    ),
    "values' elements": (
        {"weight": LIVE._replace(values=torch.zeros(16, COUNT, 2))},
        RuntimeError,
        "values must be those of masked_winograd_conv2d_weight",
    ),
    "padding": ({"padding": 3}, RuntimeError, "padding must be 0, 1 or 2, got 3"),
    "window": ({"input": X[:, :, :2].contiguous(), "padding": 0}, RuntimeError, "a window of 3 x 3 pixels"),
    "bias": ({"bias": torch.zeros(6)}, RuntimeError, r"bias must have size \[10\], got \[6\]"),
    "both": ({"relu": True, "gate": ops.empty_gate(OUT)}, RuntimeError, "relu and gate exclude each other"),
    "gate of no ReLU": ({"gate_out": ops.empty_gate(OUT)}, RuntimeError, "gate_out receives the bits of the ReLU"),
    "gate's size": ({"gate": ops.empty_gate(OUT)[:1]}, RuntimeError, "gate must have size"),
    "relu": ({"relu": 1}, TypeError, "relu must be"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_arguments_are_refused(name):
    wrong, error, message = BAD[name]
    with pytest.raises(error, match=message):
        ops.masked_winograd_conv2d_out(**{"input": X, "weight": LIVE, "out": OUT} | wrong)


def test_memory_that_is_read_may_not_be_written():
    both = torch.zeros(3, 10, 6, 7)
    live = ops.masked_winograd_conv2d_weight(
        torch.randn(10, 10, 3, 3), ops.compile_pattern(torch.ones(10, 10, 3, 3) > 0)
    )
    with pytest.raises(RuntimeError, match=r"shares? memory"):
        ops.masked_winograd_conv2d_out(both, live, out=both)


@pytest.mark.parametrize(
    "weight, pattern, error, message",
    {
        "dtype": (WEIGHT.double(), PATTERN, RuntimeError, "weight must be float32, got Double"),
        "size": (WEIGHT[:9], PATTERN, ValueError, r"made for a weight of shape \(10, 6, 3, 3\)"),
        "no tensor": ([1.0], PATTERN, TypeError, "weight must be a tensor, got list"),
        "mask": (WEIGHT, MASK, TypeError, "pattern must be what compile_pattern returned, got Tensor"),
        "5 x 5": (
            torch.randn(2, 2, 5, 5),
            ops.compile_pattern(torch.ones(2, 2, 5, 5) > 0),
            ValueError,
            "pattern must be that of 3 x 3 filters",
        ),
        "groups": (
            torch.randn(4, 2, 3, 3),
            ops.compile_pattern(torch.ones(4, 2, 3, 3) > 0, groups=2),
            ValueError,
            "without groups.* got a mask of shape .* groups=2",
        ),
    }.values(),
)
def test_weights_that_do_not_fit_are_refused(weight, pattern, error, message):
    with pytest.raises(error, match=message):
        ops.masked_winograd_conv2d_weight(weight, pattern)
