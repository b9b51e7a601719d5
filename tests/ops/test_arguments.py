"""Which views share memory, with themselves or with another tensor, as a look at every element says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_adv import ops
from sparse_adv.ops.arguments import overlap_partly, overlaps_itself

BASE = torch.arange(400.0)
dimensions = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), min_size=1, max_size=4)


def view(sizes_and_strides, start=0):
    sizes, strides = zip(*sizes_and_strides, strict=True)
    return BASE.as_strided(sizes, strides, start)


@settings(max_examples=300)
@given(dimensions)
def test_a_view_overlaps_itself_if_two_of_its_elements_are_one(dimensions):
    tensor = view(dimensions)
    assert overlaps_itself(tensor) == (tensor.unique().numel() < tensor.numel())


@settings(max_examples=600)
@given(dimensions, st.none() | dimensions, st.integers(0, 60), st.integers(0, 60))
def test_views_overlap_partly_if_they_share_elements_in_another_order(first, second, start, other):
    written, read = view(first, start), view(second or first, other)
    shared = bool(torch.isin(written.flatten(), read.flatten()).any())
    same_order = start == other and written.stride() == read.stride()
    assert overlap_partly(written, read) == (shared and not same_order)


def test_views_are_compared_whatever_the_default_device():
    both = torch.rand(2, 6, 3)
    with torch.device("meta"):
        assert not overlap_partly(both[:, :3], both[:, 3:]) and overlap_partly(both[:, :3], both[:, 2:5])
        assert overlap_partly(both[:, :3], both[:, 1:3]) and not overlaps_itself(BASE.as_strided((2, 2), (3, 2)))


def test_sums_of_several_strides_may_meet():
    assert overlaps_itself(BASE.as_strided((2, 2, 2), (1, 2, 3)))
    assert not overlaps_itself(BASE.as_strided((2, 2, 2), (1, 2, 4)))
    assert not overlaps_itself(BASE.as_strided((2, 2), (3, 2)))  # interleaved: elements 0, 2, 3 and 5


def written_ops():
    """Calls of each op that writes into memory of the caller, with operands by name."""
    images, weight = torch.rand(1, 2, 4, 4), torch.rand(2, 2, 3, 3)
    pattern = ops.compile_pattern(torch.ones(2, 2, 3, 3, dtype=torch.bool))
    pooled, index = torch.rand(1, 2, 2, 2), torch.zeros(1, 2, 2, 2, dtype=torch.uint8)
    live = ops.masked_winograd_conv2d_weight(weight, pattern)
    new, pixels = torch.zeros_like, images.contiguous(memory_format=torch.channels_last)
    return {
        "pointwise_out": (
            ops.pointwise_out,
            {"input": images, "scale": torch.rand(2), "bias": torch.rand(2), "residual": images, "out": new(images)},
        ),
        "masked_conv2d_out": (
            lambda **operands: ops.masked_conv2d_out(pattern=pattern, padding=1, **operands),
            {"input": images, "weight": weight, "bias": torch.rand(2), "residual": images, "out": new(images)},
        ),
        "masked_conv2d_grad_input_out": (
            lambda **operands: ops.masked_conv2d_grad_input_out(pattern=pattern, padding=1, **operands),
            {"grad_output": images, "weight": weight, "residual": images, "out": new(images)},
        ),
        "masked_winograd_conv2d_out": (
            lambda **operands: ops.masked_winograd_conv2d_out(weight=live, **operands),
            {"input": images, "bias": torch.rand(2), "residual": images, "out": new(images)},
        ),
        "winograd_conv2d_out": (
            ops.winograd_conv2d_out,
            {"input": pixels, "weight": ops.winograd_conv2d_weight(weight), "residual": pixels, "out": new(pixels)},
        ),
        "max_pool2d_grad_input_out": (
            lambda **operands: ops.max_pool2d_grad_input_out(index=index, kernel_size=(2, 2), **operands),
            {"grad_output": pooled, "residual": images, "out": new(images)},
        ),
        "max_pool2d_out": (
            lambda **operands: ops.max_pool2d_out(index=new(index), kernel_size=(2, 2), **operands),
            {"input": images, "out": new(pooled)},
        ),
    }


@pytest.mark.parametrize("op", written_ops())
def test_no_operand_may_be_a_negated_view_or_require_a_gradient(op):
    call, operands = written_ops()[op]
    call(**operands)
    for name, tensor in operands.items():
        negated = torch.complex(torch.zeros_like(tensor), tensor).conj().imag
        assert negated.is_neg()
        with pytest.raises(ValueError, match=f"{name} is a negated view"):
            call(**operands | {name: negated})
        with pytest.raises(ValueError, match=f"{name} requires grad: {op} is not differentiable"):
            call(**operands | {name: tensor.clone().requires_grad_()})
