"""`masked_conv2d` under autocast."""

import pytest
import torch
from helpers.convolution_cases import Case
from helpers.tolerances import assert_close

from sparse_adv.ops import masked_conv2d, reference
from sparse_adv.ops.masked_conv2d_autocast import dtype_under_autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_present_dtype(dtype):
    case = Case(group_in=3)
    weight, bias = (t.clone().requires_grad_() for t in (case.weight, torch.randn(case.weight_size[0])))
    with torch.autocast("cpu", dtype):
        output = masked_conv2d(case.input, weight, case.pattern(), bias)
    assert output.dtype == dtype
    output.float().sum().backward()
    assert weight.grad.dtype == bias.grad.dtype == torch.float32
    assert_close(output, reference.masked_conv2d(case.input, weight, case.mask, bias).to(dtype))
    assert not weight.grad[~case.mask].any() and weight.grad[case.mask].any()


def test_autocast_leaves_float64_alone():
    case = Case()
    with torch.autocast("cpu", torch.bfloat16):
        assert masked_conv2d(case.input.double(), case.weight.double(), case.pattern()).dtype == torch.float64


def test_operands_of_other_dtypes_are_refused_unless_autocast_makes_them_equal():
    case = Case()
    half = case.weight.to(torch.bfloat16)
    with pytest.raises(TypeError, match=r"weight is torch\.bfloat16, input is torch\.float32"):
        masked_conv2d(case.input, half, case.pattern())
    with torch.autocast("cpu", torch.bfloat16):
        assert masked_conv2d(case.input, half, case.pattern()).dtype == torch.bfloat16
        with pytest.raises(TypeError, match=r"weight is torch\.float64, input is torch\.float32"):
            masked_conv2d(case.input, case.weight.double(), case.pattern())


def test_the_dtype_that_autocast_casts_to():
    tensors = {dtype: torch.zeros(1, dtype=dtype) for dtype in (torch.float32, torch.float64, torch.int64)}
    assert [dtype_under_autocast(tensor) for tensor in tensors.values()] == list(tensors)
    with torch.autocast("cpu", torch.float16):
        expected = [torch.float16, torch.float64, torch.int64]
        assert [dtype_under_autocast(tensor) for tensor in tensors.values()] == expected
        assert dtype_under_autocast(torch.zeros(1, device="meta")) == torch.float32
