"""Compares `masked_conv2d_out` and `masked_conv2d_grad_input_out` with the reference."""

import torch
from torch import Tensor

from helpers.convolution_cases import Case, integers
from helpers.tolerances import assert_close, assert_equal
from sparse_adv.kernels.layout import in_layout_of
from sparse_adv.ops import (
    Pattern,
    empty_gate,
    gate_to_bool,
    masked_conv2d_grad_input_out,
    masked_conv2d_out,
    reference,
)


def random_gate(like: Tensor) -> Tensor:
    """A gate whose bits between the end of a row and the next byte are random, too."""
    return torch.randint_like(empty_gate(like), 256)


def check_forward(case: Case, pattern: Pattern, residual: str, relu: bool, dtype: torch.dtype = torch.float32) -> None:
    """Compare `masked_conv2d_out` with the reference; `residual` is "none", "out" or "another tensor"."""
    images, weight = case.input.to(dtype), case.weight.to(dtype)
    bias = integers(case.output_size[1], seed=1).to(dtype)
    added = in_layout_of(images, integers(*case.output_size, seed=2).to(dtype)) if residual != "none" else None
    wide = case.input.double(), case.weight.double(), case.mask, bias.double(), *case.shape
    expected = reference.masked_conv2d(*wide, residual=None if added is None else added.double(), relu=relu)
    out = added if added is not None and residual == "out" else in_layout_of(images, images.new_empty(case.output_size))
    gate = random_gate(out) if relu else None
    masked_conv2d_out(images, weight, pattern, bias, *case.shape, residual=added, relu=relu, out=out, gate_out=gate)
    compare(out, expected)
    if gate is not None:
        assert_equal(gate_to_bool(gate, out), expected > 0)


def check_grad_input(
    case: Case, pattern: Pattern, residual: str, gated: bool, dtype: torch.dtype = torch.float32
) -> None:
    """Compare `masked_conv2d_grad_input_out` with the reference."""
    grads, weight = case.grad_output.to(dtype), case.weight.to(dtype)
    added = in_layout_of(grads, integers(*case.input_size, seed=3).to(dtype)) if residual != "none" else None
    out = added if added is not None and residual == "out" else in_layout_of(grads, grads.new_empty(case.input_size))
    gate = random_gate(out) if gated else None
    wide = case.grad_output.double(), case.weight.double(), case.mask, case.input_size, *case.shape
    expected = reference.masked_conv2d_grad_input(
        *wide,
        residual=None if added is None else added.double(),
        gate=None if gate is None else gate_to_bool(gate, out),
    )
    masked_conv2d_grad_input_out(grads, weight, pattern, *case.shape, residual=added, gate=gate, out=out)
    compare(out, expected)


def compare(out: Tensor, expected: Tensor) -> None:
    (assert_equal if out.dtype == torch.float32 else assert_close)(out, expected)
