"""Max pooling by its Triton kernels, interpreted on the CPU: values, gradients, gates, layouts, errors."""

import pytest
import torch
import torch.nn.functional as F
from helpers.tolerances import assert_close, assert_equal
from helpers.written_passes import random_gate
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_adv.kernels import max_pool2d as kernels
from sparse_adv.ops import empty_gate, gate_to_bool
from sparse_adv.ops.max_pool2d_cuda import max_pool2d_grad_input_out, max_pool2d_out

FORMATS = (torch.contiguous_format, torch.channels_last)
SIZES = ((2, 2), (1, 2), (3, 2), (3, 3))


def images(*shape, dtype=torch.float32, format=FORMATS[0]):
    """Multiples of 1/4: there are equal elements in most windows."""
    return (torch.randint(-4, 5, shape) / 4).to(dtype).contiguous(memory_format=format)


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


def test_nan_is_the_largest_and_of_equal_elements_the_first_is_taken():
    nan, inf = torch.nan, torch.inf
    windows = [[1, 1, 1, 1], [0, 2, 2, 1], [nan, 3, 4, 5], [3, nan, inf, nan], [-inf] * 4, [-0.0, 0, 0, 0]]
    x = torch.tensor(windows).view(1, 6, 2, 2)
    out, index = torch.empty(1, 6, 1, 1), torch.empty(1, 6, 1, 1, dtype=torch.uint8)
    for format in FORMATS:
        max_pool2d_out(x.contiguous(memory_format=format), (2, 2), out, index)
        assert_equal(out, F.max_pool2d(x, 2))
        assert index.flatten().tolist() == [0, 1, 0, 3, 0, 0]


def test_an_index_out_of_range_writes_nothing_outside_of_its_window():
    grad, index, out = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 200, dtype=torch.uint8), torch.ones(1, 1, 2, 2)
    max_pool2d_grad_input_out(grad, index, (2, 2), None, None, out)
    assert not out.any()


def test_an_empty_batch_writes_nothing():
    memory = torch.ones(1, 3, 4, 4), torch.ones(1, 3, 2, 2), torch.ones(1, 3, 2, 2, dtype=torch.uint8)
    x, out, index = (images[:0] for images in memory)
    max_pool2d_out(x, (2, 2), out, index)
    max_pool2d_grad_input_out(out, index, (2, 2), None, None, x)
    assert all(images.eq(1).all() for images in memory)


like, pooled = torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 2, 4)
byte = pooled.to(torch.uint8)
BAD = {
    "no images": ({"input": torch.zeros(3, 9)}, "images must have 4 dimensions, got 2"),
    "integers": ({"input": like.int()}, "images must be float64, float32, bfloat16 or float16, got torch.int32"),
    "gaps": ({"input": torch.zeros(2, 3, 4, 16)[..., ::2]}, r"NCHW without gaps, got strides \[192, 64, 16, 2\]"),
    "window": ({"size": (0, 2)}, "window of 1 to 255 elements"),
    "large window": ({"size": (16, 16)}, "window of 1 to 255 elements"),
    "out's size": ({"out": like}, r"must have size \[2, 3, 2, 4\], got \[2, 3, 4, 8\]"),
    "out's dtype": ({"out": pooled.double()}, "pooled images must be torch.float32, got torch.float64"),
    "out's layout": ({"out": pooled.to(memory_format=torch.channels_last)}, "pooled images must be NCHW without gaps"),
    "index's dtype": ({"index": pooled}, "index must be torch.uint8, got torch.float32"),
    "index's size": ({"index": byte[:1]}, r"index must have size \[2, 3, 2, 4\], got \[1, 3, 2, 4\]"),
    "overlap": ({"out": like.view(-1)[:48].view(2, 3, 2, 4)}, "out shares memory with input"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_reported_by_name_and_value(name):
    change, message = BAD[name]
    with pytest.raises(RuntimeError, match=message):
        max_pool2d_out(**{"input": like, "size": (2, 2), "out": pooled.clone(), "index": byte.clone(), **change})


def test_bad_operands_of_the_gradient_are_refused():
    out = like.clone()
    for change, message in (
        ({"residual": pooled}, "residual must have size"),
        ({"residual": like.double()}, "residual must be torch.float32"),
        ({"residual": like.to(memory_format=torch.channels_last)}, "residual must be NCHW"),
        ({"gate": empty_gate(pooled)}, "gate must have size"),
        ({"grad": like}, "pooled images must have size"),
        ({"grad": out.view(-1)[:48].view(2, 3, 2, 4)}, "out shares memory with grad"),
    ):
        operands = {"grad": pooled, "index": byte, "size": (2, 2), "residual": None, "gate": None, "out": out, **change}
        with pytest.raises(RuntimeError, match=message):
            max_pool2d_grad_input_out(**operands)
