"""Max pooling that keeps a byte per window: values, gradients, gates, layouts, errors."""

import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers.max_pooling import (
    BAD_POOLINGS,
    BYTE,
    FORMATS,
    LIKE,
    POOLED,
    assert_refuses,
    assert_stays_in_its_window,
    assert_takes_nan_and_the_first_of_equals,
    images,
)
from helpers.tolerances import assert_close, assert_equal
from helpers.written_passes import random_gate
from hypothesis import given
from hypothesis import strategies as st

from sparse_adv.ops import empty_gate, gate_to_bool, max_pool2d_grad_input_out, max_pool2d_out


@given(
    batch=st.sampled_from((0, 1, 3)),
    channels=st.sampled_from((1, 2, 13, 64, 150)),
    pixels=st.sampled_from(((1, 1), (2, 2), (4, 4), (8, 8), (32, 32), (7, 9), (5, 67), (15, 34))),
    size=st.sampled_from((2, (2, 2), (1, 2), (3, 2), [3, 3], 1)),
    format=st.sampled_from(FORMATS),
    dtype=st.sampled_from((torch.float32, torch.float64)),
    indexed=st.booleans(),
    residual=st.sampled_from(("none", "another tensor", "out")),
    gated=st.booleans(),
)
def test_both_passes_equal_torch(batch, channels, pixels, size, format, dtype, indexed, residual, gated):
    if max(pixels) <= 2:
        size = pixels[0]
    x = images(batch, channels, *pixels, dtype=dtype, format=format)
    if x.numel():
        x[0, 0, 0, 0] = torch.nan
    expected, indices = F.max_pool2d(x, size, return_indices=True)
    expected = expected.contiguous(memory_format=format)
    out, index = torch.empty_like(expected), torch.empty_like(expected, dtype=torch.uint8)
    max_pool2d_out(x, size, out=out, index=index if indexed else None)
    assert_equal(out, expected)
    max_pool2d_out(x, size, out=out, index=index)

    grad = images(*expected.shape, dtype=dtype, format=format)
    backward = torch.ops.aten.max_pool2d_with_indices_backward
    grad_input = backward(grad, x, size, size, (0, 0), (1, 1), False, indices)
    actual = images(*x.shape, dtype=dtype, format=format)
    added = {"none": None, "another tensor": images(*x.shape, dtype=dtype, format=format), "out": actual}[residual]
    gate = random_gate(x) if gated else None
    wanted = grad_input if added is None else grad_input + added
    wanted = wanted if gate is None else wanted.where(gate_to_bool(gate, x), 0)
    max_pool2d_grad_input_out(grad, index, size, residual=added, gate=gate, out=actual)
    assert_close(actual, wanted, "elementwise")


@pytest.mark.parametrize("format", FORMATS)
def test_opcheck(format):
    x, grad = images(2, 3, 5, 9, format=format), images(2, 3, 2, 4, format=format)
    index = torch.zeros_like(grad, dtype=torch.uint8)
    torch.library.opcheck(torch.ops.sparse_adv.max_pool2d_out, (x, (2, 2), torch.zeros_like(grad), index))
    rest = (images(2, 3, 5, 9, format=format), random_gate(x), torch.zeros_like(x))
    torch.library.opcheck(torch.ops.sparse_adv.max_pool2d_grad_input_out, (grad, index, (2, 2), *rest))


BAD = BAD_POOLINGS | {
    "16 bits": ({"input": LIKE.half()}, "images must be float32 or float64, got Half"),
    "out's dtype": ({"out": POOLED.double()}, "must have the dtype of the images, Float, got Double"),
    "out's layout": ({"out": POOLED.to(memory_format=torch.channels_last)}, "must have the layout of the images"),
    "index's dtype": ({"index": POOLED}, "index must be uint8 and have the layout of the pooled images, got Float"),
}


def test_bad_operands_of_the_gradient_are_refused():
    for change, message in (
        ({"residual": POOLED}, "residual must have size"),
        ({"gate": empty_gate(POOLED)}, "gate must have size"),
        ({"grad_output": LIKE}, "pooled images must have size"),
    ):
        operands = {"grad_output": POOLED, "index": BYTE, "kernel_size": (2, 2), "out": LIKE.clone(), **change}
        with pytest.raises(RuntimeError, match=message):
            max_pool2d_grad_input_out(**operands)


@pytest.mark.parametrize("size", [(2, 2, 2), 2.0, None, "2"])
def test_a_size_that_is_not_one_or_two_integers_is_told(size):
    for call in (max_pool2d_out, partial(max_pool2d_grad_input_out, BYTE)):
        with pytest.raises(ValueError, match=re.escape(f"kernel_size must be one or two integers, got {size!r}")):
            call(LIKE, size, out=POOLED)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_reported_by_name_and_value(name):
    assert_refuses(max_pool2d_out, *BAD[name])


def test_nan_is_the_largest_and_of_equal_elements_the_first_is_taken():
    assert_takes_nan_and_the_first_of_equals(max_pool2d_out)


def test_an_index_out_of_range_writes_nothing_outside_of_its_window():
    assert_stays_in_its_window(max_pool2d_grad_input_out)
