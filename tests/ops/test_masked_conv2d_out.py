"""The convolution and its gradient into given memory: values, gates, aliases, layouts, dtypes, errors."""

from dataclasses import replace

import pytest
import torch
from helpers.convolution_cases import LAYOUTS, Case, cases, integers
from helpers.tolerances import assert_close, assert_equal
from hypothesis import given, settings
from torch import Tensor

from sparse_adv.ops import (
    empty_gate,
    gate_to_bool,
    masked_conv2d_grad_input_out,
    masked_conv2d_out,
    pack_pattern,
    reference,
)

KERNELS = ("sparse", "auto", "dense")
FORMATS = (torch.contiguous_format, torch.channels_last)
BLOCKS = ((1, 1), (2, 1), (2, 2), (4, 1), (4, 4), (1, 1, 3, 3))


def same_layout(images: Tensor, size: tuple[int, ...], seed: int) -> Tensor:
    """Integers in the layout that the ops give an output for these images."""
    channels_last = not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last)
    return integers(*size, seed=seed).contiguous(memory_format=FORMATS[channels_last])


def check(case: Case, kernel: str, dtype: torch.dtype = torch.float32) -> None:
    """Compare both ops with the reference: residual in out or not, every activation."""
    pattern = case.pattern(kernel)
    bias = integers(case.output_size[1], seed=case.seed + 7) if case.seed & 1 else None
    residual = same_layout(case.input, case.output_size, case.seed + 8) if case.seed & 2 else None
    grad_residual = same_layout(case.grad_output, case.input_size, case.seed + 9) if case.seed & 2 else None
    double = {name: x if x is None else x.double() for name, x in (("bias", bias), ("residual", residual))}
    to = {name: x if x is None else x.to(dtype) for name, x in (("bias", bias), ("residual", residual))}
    weight, relu = case.weight.to(dtype), bool(case.seed & 4)

    images = case.input.to(dtype)
    out = to["residual"] if residual is not None and case.seed & 8 else None
    out = same_layout(images, case.output_size, 0).to(dtype) if out is None else out
    gate = torch.full_like(empty_gate(out), 0xAA) if relu and case.seed & 16 else None
    expected = reference.masked_conv2d(
        case.input.double(), case.weight.double(), case.mask, double["bias"], *case.shape,
        residual=double["residual"], relu=relu,
    )  # fmt: skip
    masked_conv2d_out(
        images, weight, pattern, to["bias"], *case.shape, residual=to["residual"], relu=relu, out=out, gate=gate
    )
    (assert_equal if dtype == torch.float32 else assert_close)(out, expected)
    if gate is not None:
        assert_equal(gate_to_bool(gate, out), expected > 0)

    grads = case.grad_output.to(dtype)
    grad_residual = grad_residual if grad_residual is None else grad_residual.to(dtype)
    out = grad_residual if grad_residual is not None and case.seed & 8 else None
    out = same_layout(grads, case.input_size, 0).to(dtype) if out is None else out
    gate = torch.randint_like(empty_gate(out), 256) if case.seed & 4 else None
    expected = reference.masked_conv2d_grad_input(
        case.grad_output.double(), case.weight.double(), case.mask, case.input_size, *case.shape,
        residual=None if grad_residual is None else grad_residual.double(),
        gate=None if gate is None else gate_to_bool(gate, out),
    )  # fmt: skip
    masked_conv2d_grad_input_out(grads, weight, pattern, *case.shape, residual=grad_residual, gate=gate, out=out)
    (assert_equal if dtype == torch.float32 else assert_close)(out, expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_both_passes_equal_the_reference(kernel):
    @settings(max_examples=400 if kernel == "sparse" else 50)
    @given(cases())
    def any_case(case: Case) -> None:
        check(case, kernel)

    any_case()
