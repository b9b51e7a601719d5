"""Max pooling by its Triton kernels, interpreted on the CPU: values, gradients, gates, layouts, errors."""

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
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_adv.kernels import max_pool2d as kernels
from sparse_adv.ops import empty_gate, gate_to_bool
from sparse_adv.ops.max_pool2d_cuda import max_pool2d_grad_input_out, max_pool2d_out

SIZES = ((2, 2), (1, 2), (3, 2), (3, 3))


@settings(max_examples=30)
@given(
    st.sampled_from([(2, 13, 7, 9), (3, 16, 8, 8), (1, 1, 5, 34)]),
    st.sampled_from(SIZES),
    st.sampled_from(FORMATS),
    st.sampled_from([torch.float32, torch.float64, torch.float16]),
    st.sampled_from(["none", "bits", "values"]),
    st.sampled_from(["nothing", "another tensor", "out"]),
)
def test_both_passes_equal_torch(shape, size, format, dtype, gate, added):
    torch.manual_seed(0)
    x = images(*shape, dtype=dtype, format=format)
    x[0, 0, 0, 0] = torch.nan
    expected, indices = F.max_pool2d(x.float(), size, return_indices=True)
    expected = expected.to(dtype).contiguous(memory_format=format)
    out, index = torch.empty_like(expected), torch.empty_like(expected, dtype=torch.uint8)
    max_pool2d_out(x, size, out, None)
    assert_equal(out, expected)
    max_pool2d_out(x, size, out.zero_(), index)
    assert_equal(out, expected)

    grad = images(*expected.shape, dtype=dtype, format=format)
    grad_input = torch.ops.aten.max_pool2d_with_indices_backward(
        grad.float(), x.float(), size, size, (0, 0), (1, 1), False, indices
    )
    values, other, actual = (images(*shape, dtype=dtype, format=format) for _ in range(3))
    bits = random_gate(x)
    gate, passes = {"none": (None, True), "bits": (bits, gate_to_bool(bits, x)), "values": (values, values > 0)}[gate]
    added = {"nothing": None, "another tensor": other, "out": actual}[added]
    wanted = (grad_input if added is None else grad_input + added) * passes
    kernels.backward(grad, index, size, added, gate, actual)
    assert_close(actual, wanted, "elementwise")


def test_an_empty_batch_writes_nothing():
    memory = torch.ones(1, 3, 4, 4), torch.ones(1, 3, 2, 2), torch.ones(1, 3, 2, 2, dtype=torch.uint8)
    x, out, index = (images[:0] for images in memory)
    max_pool2d_out(x, (2, 2), out, index)
    max_pool2d_grad_input_out(out, index, (2, 2), None, None, x)
    assert all(images.eq(1).all() for images in memory)


BAD = BAD_POOLINGS | {
    "integers": ({"input": LIKE.int()}, "images must be float64, float32, bfloat16 or float16, got torch.int32"),
    "out's dtype": ({"out": POOLED.double()}, "pooled images must be torch.float32, got torch.float64"),
    "out's layout": ({"out": POOLED.to(memory_format=torch.channels_last)}, "pooled images must be NCHW without gaps"),
    "index's dtype": ({"index": POOLED}, "index must be torch.uint8, got torch.float32"),
    "overlap": ({"out": LIKE.view(-1)[:48].view(2, 3, 2, 4)}, "out shares memory with input"),
}


def test_bad_operands_of_the_gradient_are_refused():
    out = LIKE.clone()
    for change, message in (
        ({"residual": POOLED}, "residual must have size"),
        ({"residual": LIKE.double()}, "residual must be torch.float32"),
        ({"residual": LIKE.to(memory_format=torch.channels_last)}, "residual must be NCHW"),
        ({"gate": empty_gate(POOLED)}, "gate must have size"),
        ({"grad_output": LIKE}, "pooled images must have size"),
        ({"grad_output": out.view(-1)[:48].view(2, 3, 2, 4)}, "out shares memory with grad_output"),
    ):
        operands = {
            "grad_output": POOLED,
            "index": BYTE,
            "kernel_size": (2, 2),
            "residual": None,
            "gate": None,
            "out": out,
            **change,
        }
        with pytest.raises(RuntimeError, match=message):
            max_pool2d_grad_input_out(**operands)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_reported_by_name_and_value(name):
    assert_refuses(max_pool2d_out, *BAD[name])


def test_nan_is_the_largest_and_of_equal_elements_the_first_is_taken():
    assert_takes_nan_and_the_first_of_equals(max_pool2d_out)


def test_an_index_out_of_range_writes_nothing_outside_of_its_window():
    assert_stays_in_its_window(partial(max_pool2d_grad_input_out, residual=None, gate=None))
