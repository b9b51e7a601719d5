"""The dense kernel of the convolution ops on CUDA; it is plain PyTorch, so it runs here with tensors on the CPU."""

import pytest
import torch
from helpers.convolution_cases import Case, cases
from helpers.copies import Copies
from helpers.tolerances import assert_equal
from hypothesis import given, settings
from torch import Tensor

from sparse_adv.kernels.layout import empty_in_layout_of
from sparse_adv.ops import Pattern, pack_pattern
from sparse_adv.ops import masked_conv2d_cuda as cuda


def passes(case: Case, weight: Tensor, pattern: Pattern) -> dict[str, Tensor]:
    epilogue, tensors = case.epilogue, pattern.flatten()
    rest = (epilogue.get("scale"), epilogue.get("residual"), epilogue.get("relu", False))
    return {
        "forward": cuda.masked_conv2d(case.input, weight, tensors, epilogue.get("bias"), *case.shape, *rest),
        "grad_input": cuda.masked_conv2d_grad_input(case.grad_output, weight, tensors, case.input_size, *case.shape),
        "grad_weight": cuda.masked_conv2d_grad_weight(case.grad_output, case.input, tensors, *case.shape),
    }


def strides(tensor: Tensor) -> list[int]:
    """Those of dimensions with more than one element; the others have no effect."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


@settings(max_examples=200)
@given(cases())
def test_every_pass_equals_the_reference_and_has_the_layout_of_the_op(case):
    actual = passes(case, case.weight, case.pattern())
    layouts = case.results(case.pattern("dense"))
    layouts["grad_weight"] = empty_in_layout_of(case.input, case.mask.shape)
    for name, expected in case.expected().items():
        assert_equal(actual[name], expected)
        assert strides(actual[name]) == strides(layouts[name]), name


def test_the_weight_of_a_packed_pattern_is_not_masked_again():
    case = Case()
    masked = case.weight.where(case.mask, 0)
    assert_equal(passes(case, masked, pack_pattern(case.pattern(), masked))["forward"], case.expected()["forward"])
    unmasked = passes(case, case.weight, pack_pattern(case.pattern(), masked))["forward"]
    assert not torch.equal(unmasked.double(), case.expected()["forward"])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_pruned_entries_count_as_zero_even_if_they_are_not_finite(bad):
    case = Case()
    weight = case.weight.where(case.mask, bad)
    actual = passes(case, weight, case.pattern())
    assert_equal(actual["forward"], case.expected()["forward"])
    assert_equal(actual["grad_input"], case.expected()["grad_input"])
    vars(case)["input"] = torch.full_like(case.input, bad)
    assert (passes(case, case.weight, case.pattern())["grad_weight"][~case.mask] == 0).all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("layout_of_weight", [torch.contiguous_format, torch.channels_last])
def test_a_weight_is_masked_in_the_layout_in_which_it_is_read(layout, layout_of_weight):
    case, results = Case(group_in=3), {}
    x, grad = (images.contiguous(memory_format=layout) for images in (case.input, case.grad_output))
    weight, tensors = case.weight.contiguous(memory_format=layout_of_weight), case.pattern().flatten()
    with Copies(weight.shape) as copies:
        results["forward"] = cuda.masked_conv2d(x, weight, tensors, None, *case.shape, None, None, False)
        results["grad_input"] = cuda.masked_conv2d_grad_input(grad, weight, tensors, case.input_size, *case.shape)
    assert copies.count == 0
    for name, actual in results.items():
        assert_equal(actual, case.expected()[name])


@pytest.fixture
def tf32_flags():
    """The levels of PyTorch's newer API for TF32; a level that is "none" is as the one before it."""
    backends = torch.backends, torch.backends.cudnn, torch.backends.cudnn.conv
    before = [backend.fp32_precision for backend in backends]
    yield backends
    for backend, precision in zip(backends, before, strict=True):
        backend.fp32_precision = precision


@pytest.mark.parametrize("level", range(3), ids=["torch.backends", "cudnn", "cudnn.conv"])
def test_float32_is_multiplied_as_pytorch_is_told_by_either_api(tf32_flags, level):
    assert cuda.precision() == "tf32"
    tf32_flags[2].fp32_precision = "none"
    tf32_flags[level].fp32_precision = "ieee"
    assert cuda.precision() == "tf32x3"
    tf32_flags[level].fp32_precision = "tf32"
    assert cuda.precision() == "tf32"


def test_float32_is_multiplied_as_the_older_flag_says(tf32_flags):
    for allowed, precision in ((False, "tf32x3"), (True, "tf32")):
        torch.backends.cudnn.allow_tf32 = allowed
        assert cuda.precision() == precision
