"""The epilogue on its own: values, gates, layouts, dtypes, errors."""

import math

import pytest
import torch
from helpers.tolerances import assert_close, assert_equal
from helpers.written_passes import random_gate
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparse_adv.ops import empty_gate, gate_to_bool, pointwise_out, reference

FORMATS = (torch.contiguous_format, torch.channels_last)
SIZES = ((7, 7), (14, 14), (28, 28), (5, 3), (4, 4), (32, 32), (1, 1), (3, 8), (1, 17), (9, 1))


def images(*shape: int, dtype: torch.dtype = torch.float32, format: torch.memory_format = FORMATS[0]) -> Tensor:
    """Multiples of 1/4 with zeros among them."""
    return (torch.randint(-8, 9, shape) / 4).to(dtype).contiguous(memory_format=format)


@given(
    batch=st.sampled_from((0, 1, 3, 16)),
    channels=st.sampled_from((1, 2, 3, 8, 13, 64, 150)),
    size=st.sampled_from(SIZES),
    operands=st.sets(st.sampled_from(("scale", "bias", "residual"))),
    activation=st.sampled_from(("none", "relu", "relu with gate", "gate")),
    aliases=st.sampled_from(("none", "input", "residual")),
    format=st.sampled_from(FORMATS),
    dtype=st.sampled_from((torch.float32, torch.float64, torch.bfloat16, torch.float16)),
)
def test_pointwise_equals_the_reference(batch, channels, size, operands, activation, aliases, format, dtype):
    shape, options = (batch, channels, *size), {"dtype": dtype, "format": format}
    input, vectors = images(*shape, **options), {name: images(2 * channels, dtype=dtype)[::2] for name in operands}
    if "residual" in operands:
        vectors["residual"] = images(*shape, **options)
    out = {"input": input, "residual": vectors.get("residual", input)}.get(aliases, torch.empty_like(input))
    gate = random_gate(out) if activation == "gate" else None
    passes = None if gate is None else gate_to_bool(gate, out)
    gate_out = random_gate(out) if activation == "relu with gate" else None
    relu = activation.startswith("relu")
    wide = {name: tensor.double() for name, tensor in vectors.items()}
    expected = reference.pointwise(input.double(), **wide, relu=relu, gate=passes)
    pointwise_out(input, **vectors, relu=relu, gate=gate, out=out, gate_out=gate_out)
    assert_close(out, expected, "elementwise")
    if gate_out is not None:
        assert_equal(gate_to_bool(gate_out, out), expected > 0)
        assert not padding_bits(gate_out, out).any()


def padding_bits(gate: Tensor, like: Tensor) -> Tensor:
    """The bits of a gate between the end of a row and the next byte."""
    row = like.shape[1] if not like.is_contiguous() else like.shape[3]
    bits = gate[..., None] >> torch.arange(8, dtype=torch.uint8) & 1
    return bits.flatten(-2)[..., row:]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_that_are_not_finite_and_signed_zeros_behave_as_in_torch(format, dtype):
    values = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-45, 2.0, -2.0], dtype=dtype)
    input = values.repeat(1, 5, 3, 4).contiguous(memory_format=format)
    out, gate = torch.empty_like(input), empty_gate(input)
    pointwise_out(input, relu=True, out=out, gate_out=gate)
    assert_equal(out, input.relu())
    grad = values.flip(0).repeat(1, 5, 3, 4).contiguous(memory_format=format)
    passed = torch.empty_like(input)
    pointwise_out(grad, gate=gate, out=passed)
    assert_equal(passed, torch.ops.aten.threshold_backward(grad, out, 0))


@pytest.mark.parametrize("format", FORMATS)
def test_results_do_not_depend_on_the_number_of_threads(format):
    input, residual = (torch.randn(9, 37, 21, 23).contiguous(memory_format=format) for _ in range(2))
    scale, bias = torch.randn(37), torch.randn(37)
    results, before = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        out, gate = torch.empty_like(input), empty_gate(input)
        pointwise_out(input, scale, bias, residual, relu=True, out=out, gate_out=gate)
        results.append((out, gate))
    torch.set_num_threads(before)
    for out, gate in results[1:]:
        assert_equal(out, results[0][0])
        assert_equal(gate, results[0][1])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("activation", [{"relu": True, "gate_out": True}, {"gate": True}, {}])
def test_opcheck(format, activation):
    input = images(2, 3, 4, 9, format=format)
    gates = {name: random_gate(input) for name in activation if name.startswith("gate")}
    arguments = (input, images(3), images(3), images(2, 3, 4, 9, format=format), activation.get("relu", False))
    out = torch.zeros_like(input)
    operands = (*arguments, gates.get("gate"), out, gates.get("gate_out"))
    torch.library.opcheck(torch.ops.sparse_adv.pointwise_out, operands)


def test_a_written_tensor_gets_a_new_version():
    input, out = torch.ones(1, 1, 2, 2), torch.empty(1, 1, 2, 2)
    weight = torch.ones(1, requires_grad=True)
    product = weight * out
    pointwise_out(input, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


like = torch.zeros(2, 3, 4, 9)
overlapping = torch.zeros(2 * 3 * 4 * 9 + 1)
BAD = {
    "out has no images": ({"out": torch.zeros(3, 9)}, "out must have 4 dimensions, got 2"),
    "out of integers": ({"out": like.int()}, "out must be float64, float32, bfloat16 or float16"),
    "out with gaps": (
        {"out": torch.zeros(2, 3, 4, 18)[..., ::2]},
        r"out .* without gaps, got strides \[216, 72, 18, 2\]",
    ),
    "input's size": ({"input": torch.zeros(2, 3, 4, 8)}, r"input must have size \[2, 3, 4, 9\], got \[2, 3, 4, 8\]"),
    "input's dtype": ({"input": like.double()}, "input must have the dtype of out, Float, got Double"),
    "input's layout": (
        {"input": like.to(memory_format=torch.channels_last)},
        r"input must have the layout of out, strides \[108, 36, 9, 1\], got \[108, 1, 27, 3\]",
    ),
    "scale": ({"scale": torch.zeros(4)}, r"scale must have size \[3\], got \[4\]"),
    "bias": ({"bias": torch.zeros(3).double()}, "bias must have the dtype of out, Float, got Double"),
    "residual": ({"residual": torch.zeros(2, 3, 4)}, r"residual must have size \[2, 3, 4, 9\], got \[2, 3, 4\]"),
    "residual's layout": (
        {"residual": like.to(memory_format=torch.channels_last)},
        "residual must have the layout of out",
    ),
    "gate's size": (
        {"gate": torch.zeros(2, 3, 4, 1, dtype=torch.uint8)},
        r"gate must have size \[2, 3, 4, 2\], got \[2, 3, 4, 1\]",
    ),
    "gate's dtype": ({"gate": torch.zeros(2, 3, 4, 2)}, "gate must be uint8 and contiguous, got Float"),
    "gate_out's layout": (
        {"gate_out": torch.zeros(2, 3, 2, 4, dtype=torch.uint8).mT, "relu": True},
        "gate_out must be uint8 and contiguous, got Byte with strides",
    ),
    "relu and gate": ({"relu": True, "gate": empty_gate(like)}, "relu and gate exclude each other"),
    "gate_out without relu": ({"gate_out": empty_gate(like)}, "gate_out receives the bits .* relu is False"),
    "overlap": (
        {"input": overlapping[1:].view(like.shape), "out": overlapping[:-1].view(like.shape)},
        "out shares memory with input",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_reported_by_name_and_value(name):
    change, message = BAD[name]
    with pytest.raises(RuntimeError, match=message):
        pointwise_out(**{"input": like, "out": torch.zeros_like(like), **change})


def test_gradients_are_refused():
    with pytest.raises(ValueError, match=r"scale requires grad: pointwise_out .* torch.no_grad\(\)"):
        pointwise_out(like, torch.ones(3, requires_grad=True), out=torch.zeros_like(like))


def test_the_input_may_not_be_missing():
    with pytest.raises(TypeError, match="input must be a tensor, got NoneType"):
        pointwise_out(None, out=torch.zeros_like(like))
