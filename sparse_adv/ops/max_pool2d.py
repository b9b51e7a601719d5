"""`max_pool2d_out`, max pooling that keeps a byte per window, and its gradient, which adds a residual and a gate."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_adv.ops.arguments import Pair, check_tensors, read_pair
from sparse_adv.ops.written import check_written, mark_written, returns_nothing


def max_pool2d_out(input: Tensor, kernel_size: Pair, *, out: Tensor, index: Tensor | None = None) -> None:
    """Take the maximum of each window, with the window's size as stride, into memory that the caller provides.

    Equivalent to::

        out = F.max_pool2d(input, kernel_size)

    As in PyTorch, a NaN counts as larger than any number, and of equal elements the first is taken, row by row. It is
    implemented on the CPU and, with Triton, on CUDA, and not differentiable.

    Args:
        input: float32 or float64 tensor (on CUDA any float dtype) [N, C, H, W], NCHW or channels_last without gaps.
        kernel_size: rows and columns of a window, as one or two integers, at most 255 elements. Rows and columns
            that fill no window are left out.
        out: tensor [N, C, H // rows, W // columns] in the dtype and layout of the input, that is written.
        index: uint8 tensor like out, or None: receives the number of each window's largest element, row by row.

    Raises:
        TypeError: if an operand is not a dense tensor.
        ValueError: if kernel_size is not one or two integers, devices differ, or a tensor requires grad and gradients
            are enabled.
        RuntimeError: if a shape, dtype or layout does not fit, or tensors overlap.

    Source: this library's design page "The engine", the section on the backward pass.

    Examples:
        >>> x, y = torch.tensor([[1.0, 5.0, 2.0], [4.0, 3.0, 9.0]]).view(1, 1, 2, 3), torch.empty(1, 1, 1, 1)
        >>> index = torch.empty(1, 1, 1, 1, dtype=torch.uint8)
        >>> max_pool2d_out(x, 2, out=y, index=index)
        >>> y.item(), index.item()
        (5.0, 1)
    """
    window = read_pair("kernel_size", kernel_size)
    check_tensors(input=input)
    check_written("max_pool2d_out", out, input=input, index=index)
    torch.ops.sparse_adv.max_pool2d_out(input, window, out, index)
    mark_written(out, index)


def max_pool2d_grad_input_out(
    grad_output: Tensor,
    index: Tensor,
    kernel_size: Pair,
    *,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    out: Tensor,
) -> None:
    """Compute the gradient of max pooling's input, add a residual and apply a gate, into memory that the caller
    provides.

    Equivalent to::

        y = grad_input + residual
        out = y.where(gate_to_bool(gate, out), 0)

    where grad_input is grad_output at the largest element of each window and 0 elsewhere, and an operand that is None
    is left out. It is implemented on the CPU and, with Triton, on CUDA, and not differentiable.

    Args:
        grad_output: gradient of the output, [N, C, H // rows, W // columns] in the layout and dtype of out.
        index: uint8 tensor like grad_output, as `max_pool2d_out` wrote it.
        kernel_size: rows and columns of a window, as one or two integers.
        residual: tensor like out, or None; it may be out.
        gate: uint8 tensor of the shape of `empty_gate(out)`, or None: makes the elements 0 whose bit is 0.
        out: tensor [N, C, H, W] of the dtypes and layouts that `max_pool2d_out` takes, that is written.

    Raises:
        TypeError: if an operand is not a dense tensor.
        ValueError: if kernel_size is not one or two integers, devices differ, or a tensor requires grad and gradients
            are enabled.
        RuntimeError: if a shape, dtype or layout does not fit, or tensors overlap.

    Source: this library's design page "The engine", the section on the backward pass.

    Examples:
        >>> grad_output, index = torch.tensor([[[[7.0]]]]), torch.tensor([[[[1]]]], dtype=torch.uint8)
        >>> out = torch.empty(1, 1, 2, 2)
        >>> max_pool2d_grad_input_out(grad_output, index, (2, 2), out=out)
        >>> out.flatten().tolist()
        [0.0, 7.0, 0.0, 0.0]
    """
    window = read_pair("kernel_size", kernel_size)
    check_tensors(grad_output=grad_output, index=index)
    check_written("max_pool2d_grad_input_out", out, grad_output=grad_output, index=index, residual=residual, gate=gate)
    torch.ops.sparse_adv.max_pool2d_grad_input_out(grad_output, index, window, residual, gate, out)
    mark_written(out)


returns_nothing("max_pool2d_out", "max_pool2d_grad_input_out")
