"""Winograd's filtering: values, gradients, gates, layouts, errors, against PyTorch's convolution in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.convolution_cases import LAYOUTS
from helpers.tolerances import assert_close, assert_equal
from helpers.written_passes import random_gate
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sparse_adv.ops import (
    empty_gate,
    gate_to_bool,
    reference,
    winograd_conv2d,
    winograd_conv2d_out,
    winograd_conv2d_weight,
)

TILES = (2, 4)
CHANNELS = (1, 3, 16, 17, 33, 64)


def channels_last(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def padded(zeros: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Images of at least one window."""
    rows, cols = (max(length, 3 - 2 * zero) for length, zero in zip(size, zeros, strict=True))
    return rows, cols


@given(
    batch=st.sampled_from((0, 1, 3, 7)),
    channels=st.tuples(st.sampled_from(CHANNELS), st.sampled_from(CHANNELS)),
    size=st.tuples(st.integers(1, 13), st.integers(1, 13)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    tile=st.sampled_from(TILES),
    layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 3),
    bias=st.booleans(),
)
def test_values_and_gradients_equal_those_of_a_direct_convolution(batch, channels, size, padding, tile, layouts, bias):
    (C, K), size = channels, padded(padding, size)
    operands = [torch.randn(batch, C, *size), torch.randn(K, C, 3, 3)]
    operands = [LAYOUTS[layout](tensor) for layout, tensor in zip(layouts, operands, strict=False)]
    operands += [torch.randn(2 * K)[::2]] if bias else []
    leaves, wide = (
        [tensor.to(dtype, copy=True).requires_grad_() for tensor in operands] for dtype in (None, torch.float64)
    )
    out, expected = winograd_conv2d(*leaves, padding=padding, tile=tile), F.conv2d(*wide, padding=padding)
    assert_close(out, expected)
    assert out.is_contiguous(memory_format=torch.channels_last) or layouts[0] != "channels_last"
    grad = LAYOUTS[layouts[2]](torch.randn(out.shape))
    gradients = zip(
        torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, wide, grad.double()), strict=True
    )
    for actual, reference_ in gradients:
        assert_close(actual, reference_)


@given(
    batch=st.sampled_from((1, 4)),
    channels=st.tuples(st.sampled_from((3, 16, 40)), st.sampled_from((8, 13, 17, 64))),
    size=st.sampled_from(((2, 2), (4, 4), (5, 9), (7, 3))),
    padding=st.sampled_from(((1, 1), (2, 0), (0, 2))),
    tile=st.sampled_from(TILES),
    operands=st.sets(st.sampled_from(("bias", "residual"))),
    activation=st.sampled_from(("none", "relu", "relu with gate", "gate")),
    in_place=st.booleans(),
)
def test_epilogues_equal_the_reference(batch, channels, size, padding, tile, operands, activation, in_place):
    (C, K), size = channels, padded(padding, size)
    x, weight = channels_last(batch, C, *size), torch.randn(K, C, 3, 3)
    bias = torch.randn(K) if "bias" in operands else None
    sums = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), padding=padding)
    residual = channels_last(*sums.shape) if "residual" in operands else None
    out = residual if in_place and residual is not None else channels_last(*sums.shape)
    if activation in ("relu with gate", "gate") and (out.is_contiguous() or K == 1):
        return  # one pixel: refused, see below
    gate = random_gate(out) if activation == "gate" else None
    gate_out = random_gate(out) if activation == "relu with gate" else None
    relu, passes = activation.startswith("relu"), None if gate is None else gate_to_bool(gate, out)
    expected = reference.pointwise(
        sums, residual=None if residual is None else residual.double(), relu=relu, gate=passes
    )
    winograd_conv2d_out(
        *(x, winograd_conv2d_weight(weight, tile=tile), bias, padding),
        **{"residual": residual, "relu": relu, "gate": gate, "out": out, "gate_out": gate_out},
    )
    assert_close(out, expected)
    if gate_out is not None:
        assert_equal(gate_to_bool(gate_out, out), ~(out <= 0))


@pytest.mark.parametrize("padding", [0, 1, 2, [2, 1], "same", "valid"])
def test_padding_is_told_as_to_conv2d(padding):
    x, weight, bias = channels_last(2, 5, 6, 7), torch.randn(9, 5, 3, 3), torch.randn(9)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=padding)
    out = channels_last(*expected.shape)
    winograd_conv2d_out(x, winograd_conv2d_weight(weight), bias, padding, out=out)
    assert_close(out, expected)
    assert_equal(winograd_conv2d(x, weight, bias, padding), out)


@pytest.mark.parametrize("tile", TILES)
def test_the_transposed_weights_give_the_gradient_of_the_input(tile):
    x, weight = channels_last(2, 5, 6, 7), torch.randn(9, 5, 3, 3)
    grad, out = channels_last(2, 9, 8, 5), torch.empty_like(x)
    winograd_conv2d_out(grad, winograd_conv2d_weight(weight, tile=tile, transposed=True), padding=(0, 2), out=out)
    assert_close(out, reference.masked_conv2d_grad_input(grad, weight, weight == weight, x.shape, 1, (2, 0)))


@pytest.mark.parametrize("tile", TILES)
def test_second_derivatives(tile):
    def penalty(convolution, dtype):
        x, weight = (
            torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            for shape in ((2, 3, 5, 6), (4, 3, 3, 3))
        )
        x, weight = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        gradients = torch.autograd.grad(
            convolution(x, weight, padding=(1, 0)).pow(3).sum(), (x, weight), create_graph=True
        )
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), (x, weight))

    actual = penalty(lambda *operands, padding: winograd_conv2d(*operands, padding=padding, tile=tile), torch.float32)
    for gradient, expected in zip(actual, penalty(F.conv2d, torch.float64), strict=True):
        assert_close(gradient, expected)


@pytest.mark.parametrize("tile, most", [(2, 4e-6), (4, 5e-5)])
def test_rounding_errors_are_small(tile, most):
    """Relative to the largest value; a direct convolution in float32 reaches 2e-6."""
    x, weight = channels_last(4, 512, 8, 8), torch.randn(64, 512, 3, 3)
    expected = F.conv2d(x.double(), weight.double(), padding=1)
    error = (winograd_conv2d(x, weight, tile=tile) - expected).abs().max() / expected.abs().max()
    assert error < most


def test_results_do_not_depend_on_the_number_of_threads_or_images():
    x, weight = channels_last(13, 20, 11, 9), torch.randn(33, 20, 3, 3)
    weight.requires_grad_()
    before, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        out = winograd_conv2d(x, weight)
        results.append((out.detach(), *torch.autograd.grad(out, weight, out.detach())))
    torch.set_num_threads(before)
    for out, gradient in results[1:]:
        assert_equal(out, results[0][0])
        assert_equal(gradient, results[0][1])
    assert_equal(winograd_conv2d(x[4:7], weight), results[0][0][4:7])


def test_parts_of_many_channels_have_the_bits_of_the_whole():
    operators, padding = torch.ops.sparse_adv, [1, 1]
    x, weight, bias = channels_last(3, 512, 4, 5), torch.randn(520, 512, 3, 3), torch.randn(520)
    grad, out, grad_input = channels_last(3, 520, 4, 5), channels_last(3, 520, 4, 5), torch.empty_like(x)
    winograd_conv2d_out(x, winograd_conv2d_weight(weight), bias, out=out)
    winograd_conv2d_out(grad, winograd_conv2d_weight(weight, transposed=True), out=grad_input)
    grad_weight = torch.cat(
        [operators.winograd_conv2d_grad_weight(part, x, padding, 4) for part in grad.split(130, dim=1)]
    )
    before = torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        assert_equal(winograd_conv2d(x, weight, bias), out)
        assert_equal(operators.winograd_conv2d(grad, weight, None, padding, 4, True), grad_input)
        assert_equal(operators.winograd_conv2d_grad_weight(grad, x, padding, 4), grad_weight)
    torch.set_num_threads(before)


def test_a_nan_reaches_at_most_its_tile_and_never_vanishes():
    x, weight = channels_last(1, 3, 12, 12), torch.ones(2, 3, 3, 3)
    x[0, 1, 5, 5] = math.nan
    expected, actual = (
        convolution(x, weight) for convolution in (lambda x, w: F.conv2d(x, w, padding=1), winograd_conv2d)
    )
    assert actual[expected.isnan()].isnan().all()
    assert actual[:, :, 8:].isfinite().all() and actual[:, :, :, 8:].isfinite().all()


@pytest.mark.parametrize("tile", TILES)
def test_opcheck(tile):
    x, weight, bias = channels_last(2, 3, 4, 6), torch.randn(5, 3, 3, 3), torch.randn(5)
    operators, transformed = torch.ops.sparse_adv, winograd_conv2d_weight(weight, tile=tile)
    leaves = tuple(tensor.requires_grad_() for tensor in (x.clone(), weight, bias))
    torch.library.opcheck(operators.winograd_conv2d, (*leaves, [1, 2], tile, False))
    torch.library.opcheck(operators.winograd_conv2d, (channels_last(2, 5, 4, 6), weight, None, [1, 0], tile, True))
    grad = channels_last(2, 5, 4, 8).requires_grad_()
    torch.library.opcheck(operators.winograd_conv2d_grad_weight, (grad, leaves[0], [1, 2], tile))
    torch.library.opcheck(operators.winograd_conv2d_weight, (weight.detach(), tile, True))
    out = torch.empty(2, 5, 4, 6).contiguous(memory_format=torch.channels_last)
    rest = [1, 1], bias.detach(), channels_last(2, 5, 4, 6), True, None, out, empty_gate(out)
    torch.library.opcheck(operators.winograd_conv2d_out, (x, transformed, *rest))


def test_operations_are_those_of_a_direct_convolution():
    x, weight = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
    counts = []
    for convolution in (winograd_conv2d, lambda x, w: F.conv2d(x, w, padding=1)):
        with FlopCounterMode(display=False) as counter:
            convolution(x, weight).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    out = channels_last(2, 4, 8, 8)
    with FlopCounterMode(display=False) as counter:
        winograd_conv2d_out(channels_last(2, 3, 8, 8), winograd_conv2d_weight(weight), out=out)
    assert counter.get_total_flops() == 2 * 9 * 3 * out.numel()


def test_under_transforms_pytorch_convolves():
    x, weight = torch.randn(3, 2, 4, 5, 5), torch.randn(6, 4, 3, 3)
    mapped = torch.func.vmap(lambda x: winograd_conv2d(x, weight))(x)
    assert_close(mapped, torch.stack([F.conv2d(part, weight, padding=1) for part in x]))
    with pytest.raises(ValueError, match="it cannot run under"):
        torch.func.vmap(lambda x: winograd_conv2d_out(x, weight, out=x))(x)


def test_a_written_tensor_gets_a_new_version():
    x, out = channels_last(1, 4, 4, 4), channels_last(1, 4, 4, 4)
    product = torch.ones(1, requires_grad=True) * out
    winograd_conv2d_out(x, winograd_conv2d_weight(torch.randn(4, 4, 3, 3)), out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


IMAGES, WEIGHT = channels_last(2, 4, 6, 7), torch.randn(5, 4, 3, 3)
BAD = {
    "input's dtype": ({"input": IMAGES.double()}, RuntimeError, "input must be float32, got Double"),
    "weight's dtype": ({"weight": WEIGHT.half()}, RuntimeError, "weight must be float32, got Half"),
    "5 x 5": ({"weight": torch.randn(5, 4, 5, 5)}, RuntimeError, r"weight must be \[K, C, 3, 3\], got \[5, 4, 5, 5\]"),
    "channels": ({"weight": WEIGHT[:, :3]}, RuntimeError, r"input must be \[N, 3, H, W\], got \[2, 4, 6, 7\]"),
    "bias": ({"bias": torch.randn(4)}, RuntimeError, r"bias must have size \[5\], got \[4\]"),
    "padding": ({"padding": (1, 3)}, RuntimeError, "padding must be 0, 1 or 2, got 3"),
    "padding's type": ({"padding": 1.5}, ValueError, "padding must be one or two integers, got 1.5"),
    "padding's name": ({"padding": "full"}, ValueError, '"same" or "valid", got .full.'),
    "tile": ({"tile": 3}, RuntimeError, "tile must be 2 or 4, got 3"),
    "tile's type": ({"tile": 2.0}, TypeError, "tile must be an integer, got 2.0"),
    "window": (
        {"input": IMAGES[:, :, :2], "padding": (0, 0)},
        RuntimeError,
        "input must have a window of 3 x 3 pixels",
    ),
    "no pixels": (
        {"input": IMAGES[:, :, :0], "padding": 2},
        RuntimeError,
        r"input must have pixels, got \[2, 4, 0, 7\]",
    ),
    "no channels": ({"weight": WEIGHT[:0]}, RuntimeError, r"weight must not be empty, got size \[0, 4, 3, 3\]"),
    "no tensor": ({"input": [1.0]}, TypeError, "input must be a tensor, got list"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_arguments_are_refused(name):
    wrong, error, message = BAD[name]
    with pytest.raises(error, match=message):
        winograd_conv2d(**{"input": IMAGES, "weight": WEIGHT} | wrong)


OUT = channels_last(2, 5, 6, 7)
BAD_OUT = {
    "NCHW": ({"input": IMAGES.contiguous()}, "input must be channels_last without gaps"),
    "out NCHW": ({"out": OUT.contiguous()}, "out must be channels_last without gaps"),
    "out's size": ({"out": OUT[:, :, 1:]}, r"out must have size \[2, 5, 6, 7\], got \[2, 5, 5, 7\]"),
    "weight as it is": ({"weight": WEIGHT}, "weight must be a result of winograd_conv2d_weight"),
    "other weight": ({"weight": winograd_conv2d_weight(WEIGHT[:, :3])}, r"weight must have size \[36, 1, 4, 32\]"),
    "residual": ({"residual": OUT.contiguous()}, "residual must have the layout of out"),
    "both": ({"relu": True, "gate": empty_gate(OUT)}, "relu and gate exclude each other"),
    "gate of no ReLU": ({"gate_out": empty_gate(OUT)}, "gate_out receives the bits of the ReLU"),
    "gate's size": ({"gate": empty_gate(OUT)[:1]}, r"gate must have size \[2, 6, 7, 1\]"),
    "gate_out's size": ({"relu": True, "gate_out": empty_gate(OUT)[:1]}, r"gate_out must have size \[2, 6, 7, 1\]"),
    "out is input": ({"input": OUT, "weight": winograd_conv2d_weight(torch.randn(5, 5, 3, 3))}, "shares? memory"),
}


@pytest.mark.parametrize("name", BAD_OUT)
def test_wrong_arguments_of_the_op_that_writes_are_refused(name):
    wrong, message = BAD_OUT[name]
    arguments = {"input": IMAGES, "weight": winograd_conv2d_weight(WEIGHT), "out": OUT} | wrong
    with pytest.raises(RuntimeError, match=message):
        winograd_conv2d_out(**arguments)


def test_a_gate_of_one_pixel_is_refused():
    x, out = channels_last(2, 4, 1, 1), torch.empty(2, 5, 1, 1)
    with pytest.raises(RuntimeError, match="a gate needs an out of several channels and pixels"):
        winograd_conv2d_out(x, winograd_conv2d_weight(WEIGHT), relu=True, out=out, gate_out=empty_gate(out))
