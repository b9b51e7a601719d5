"""`winograd_conv2d`, a dense 3 x 3 convolution with fewer multiplications, and its two parts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sparse_adv.kernels.layout import empty_in_layout_of
from sparse_adv.ops.arguments import Pair, check_flag, check_integer, check_tensors
from sparse_adv.ops.autograd import Saved, register_autograd
from sparse_adv.ops.conv_geometry import read_padding
from sparse_adv.ops.transforms import is_transformed
from sparse_adv.ops.written import check_written, mark_written, returns_nothing

PANEL = 32
"""Output channels that lie side by side in transformed weights (csrc/cpu/winograd_conv2d/conv_kernel.h)."""


def winograd_conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, padding: Pair | str = 1, *, tile: int = 4
) -> Tensor:
    """Convolve with 3 x 3 weights and stride 1 by Winograd's filtering, on a CPU.

    Equivalent, but for rounding, to::

        F.conv2d(input, weight, bias, padding=padding)

    It works on channels_last images; others are copied. It takes 1/4 (tile 4) or 1/2.25 (tile 2) of the multiplications
    of a direct convolution, also for the two gradients. For operands of unit variance and 512 channels, the greatest
    error divided by the root of the number of terms is 1e-4 (tile 4) or 5e-6 (tile 2); oneDNN's direct convolution has
    1e-5. A value that is not finite, or whose sums with its neighbours are not, reaches all pixels of its tile. Every
    call transforms the weights; `winograd_conv2d_out` takes transformed weights. Under `torch.func` and forward-mode
    AD, PyTorch convolves.

    Args:
        input: float32 tensor [N, C, H, W] on the CPU.
        weight: float32 tensor [K, C, 3, 3].
        bias: float32 tensor [K], or None.
        padding: rows and columns of zeros on each side, as one or two integers from 0 to 2, "same" or "valid".
        tile: rows and columns of output pixels that are computed together, 2 or 4.

    Returns:
        float32 tensor [N, K, H + 2 padding - 2, W + 2 padding - 2], NCHW or channels_last as the input is. It is
        differentiable any number of times.

    Raises:
        TypeError: if tile is not an integer, or an operand is not a dense tensor.
        ValueError: if padding is neither one or two integers nor "same" or "valid".
        RuntimeError: if a shape, dtype, padding or tile does not fit.
        NotImplementedError: on other devices than a CPU.

    Source: Lavin and Gray, "Fast algorithms for convolutional neural networks" (CVPR 2016), sections 3 and 4.

    Examples:
        >>> x, w = torch.rand(1, 5, 6, 6), torch.rand(8, 5, 3, 3)
        >>> torch.allclose(winograd_conv2d(x, w), torch.conv2d(x, w, padding=1), atol=1e-4)
        True
    """
    zeros = read_padding(padding, (3, 3))
    check_integer("tile", tile)
    check_tensors(input=input, weight=weight, **({} if bias is None else {"bias": bias}))
    if is_transformed():
        return F.conv2d(input, weight, bias, padding=zeros)
    return torch.ops.sparse_adv.winograd_conv2d(input, weight, bias, zeros, tile, False)


def winograd_conv2d_weight(weight: Tensor, *, tile: int = 4, transposed: bool = False) -> Tensor:
    """Transform the weights of a 3 x 3 convolution for `winograd_conv2d_out`.

    u = G w G^T for each pair of channels, with the source's matrix G. The result is (tile + 2)^2 / 9 times as large as
    the weights, with output channels rounded up to a multiple of 32.

    Args:
        weight: float32 tensor [K, C, 3, 3] on the CPU, in any layout.
        tile: rows and columns of output pixels that are computed together, 2 or 4.
        transposed: True for the convolution that gives the gradient of the input: from K channels to C, with the taps
            turned by 180 degrees.

    Returns:
        float32 tensor [(tile + 2)^2, ceil(K / 32), C, 32]; if transposed, K and C are exchanged. It is not
        differentiable.

    Raises:
        TypeError: if weight is no tensor, or tile is not an integer.
        RuntimeError: for another dtype, size or tile.
        NotImplementedError: on other devices than a CPU.

    Source: Lavin and Gray 2016, as `winograd_conv2d`.

    Examples:
        >>> winograd_conv2d_weight(torch.rand(8, 5, 3, 3)).shape
        torch.Size([36, 1, 5, 32])
        >>> winograd_conv2d_weight(torch.rand(8, 5, 3, 3), tile=2, transposed=True).shape
        torch.Size([16, 1, 8, 32])
    """
    check_tensors(weight=weight)
    check_integer("tile", tile)
    check_flag("transposed", transposed)
    return torch.ops.sparse_adv.winograd_conv2d_weight(weight.detach(), tile, transposed)


def winograd_conv2d_out(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    padding: Pair | str = 1,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
    gate: Tensor | None = None,
    out: Tensor,
    gate_out: Tensor | None = None,
) -> None:
    """Convolve with 3 x 3 weights and stride 1 by Winograd's filtering, into memory that the caller provides.

    Equivalent, but for rounding, to::

        y = conv2d(input, w, padding=padding) + bias[:, None, None] + residual
        out = y.relu() if relu else y.where(gate_to_bool(gate, out), 0)

    where weight is `winograd_conv2d_weight(w)`, and an operand that is None is left out. The gradient of the input is
    the same op with transposed weights and padding 2 - p. A value that is not finite reaches all pixels of its tile. It
    is not differentiable.

    Args:
        input: float32 tensor [N, C, H, W] on the CPU, channels_last without gaps.
        weight: result of `winograd_conv2d_weight`.
        bias: float32 tensor [K], or None.
        padding: as for `winograd_conv2d`.
        residual: tensor like out, or None; it may be out.
        relu: whether a ReLU follows.
        gate: uint8 tensor of the shape of `empty_gate(out)`, or None: makes the elements 0 whose bit is 0. Not with
            relu.
        out: float32 tensor [N, K, H + 2 padding - 2, W + 2 padding - 2], channels_last, that is written.
        gate_out: uint8 tensor of the shape of `empty_gate(out)`, or None, only with relu: receives for each element of
            out a bit that says whether the ReLU passes the gradient.

    Raises:
        TypeError: if an operand is not a dense tensor.
        ValueError: if padding is neither one or two integers nor "same" or "valid", devices differ, or a tensor
            requires grad and gradients are enabled.
        RuntimeError: if a shape, dtype or layout does not fit, or tensors overlap.
        NotImplementedError: on other devices than a CPU.

    Source: Lavin and Gray 2016, as `winograd_conv2d`.

    Examples:
        >>> x = torch.rand(1, 5, 6, 6).to(memory_format=torch.channels_last)
        >>> w, y = torch.rand(8, 5, 3, 3), torch.empty(1, 8, 6, 6, memory_format=torch.channels_last)
        >>> winograd_conv2d_out(x, winograd_conv2d_weight(w), out=y)
        >>> torch.allclose(y, torch.conv2d(x, w, padding=1), atol=1e-4)
        True
    """
    zeros = read_padding(padding, (3, 3))
    check_flag("relu", relu)
    check_tensors(input=input, weight=weight)
    operands = {"input": input, "weight": weight, "bias": bias, "residual": residual, "gate": gate}
    check_written("winograd_conv2d_out", out, **operands, gate_out=gate_out)
    torch.ops.sparse_adv.winograd_conv2d_out(input, weight, zeros, bias, residual, relu, gate, out, gate_out)
    mark_written(out, gate_out)


@torch.library.register_fake("sparse_adv::winograd_conv2d")
def _(input: Tensor, weight: Tensor, bias: Tensor | None, padding: list[int], tile: int, transposed: bool) -> Tensor:
    count, _, height, width = input.shape
    size = count, weight.shape[1 if transposed else 0], height + 2 * padding[0] - 2, width + 2 * padding[1] - 2
    return empty_in_layout_of(input, size)


@torch.library.register_fake("sparse_adv::winograd_conv2d_grad_weight")
def _(grad_output: Tensor, input: Tensor, padding: list[int], tile: int) -> Tensor:
    return input.new_empty(grad_output.shape[1], input.shape[1], 3, 3)


# The two ops are closed under differentiation: both are linear in both operands, so each gradient is one of them.


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, _, ctx.padding, ctx.tile, ctx.transposed = inputs
    ctx.save_for_backward(input, weight)


def _backward(ctx: Any, saved: Saved, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, weight = saved
    needs_input, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    operators, other = torch.ops.sparse_adv, [2 - zeros for zeros in ctx.padding]
    grad_input = grad_weight = None
    if needs_input:
        grad_input = operators.winograd_conv2d(grad, weight, None, other, ctx.tile, not ctx.transposed)
    if needs_weight:
        # If transposed, input and gradient exchange their roles.
        operands = (input, grad, other) if ctx.transposed else (grad, input, ctx.padding)
        grad_weight = operators.winograd_conv2d_grad_weight(*operands, ctx.tile)
    return grad_input, grad_weight, grad.sum((0, 2, 3)) if needs_bias else None, None, None, None


def _setup_grad_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, input, ctx.padding, ctx.tile = inputs
    ctx.save_for_backward(grad, input)


def _backward_grad_weight(ctx: Any, saved: Saved, of_weight: Tensor) -> tuple[Tensor | None, ...]:
    grad, input = saved
    needs_grad, needs_input, *_ = ctx.needs_input_grad
    convolve, other = torch.ops.sparse_adv.winograd_conv2d, [2 - zeros for zeros in ctx.padding]
    of_grad = convolve(input, of_weight, None, ctx.padding, ctx.tile, False) if needs_grad else None
    of_input = convolve(grad, of_weight, None, other, ctx.tile, True) if needs_input else None
    return of_grad, of_input, None, None


register_autograd("winograd_conv2d", _backward, _setup)
register_autograd("winograd_conv2d_grad_weight", _backward_grad_weight, _setup_grad_weight)


@register_flop_formula(torch.ops.sparse_adv.winograd_conv2d)
def _operations(input: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    """The operations of a direct convolution, as for PyTorch's."""
    return 2 * 9 * weight[0] * weight[1] * out_shape[0] * out_shape[2] * out_shape[3]


@register_flop_formula(torch.ops.sparse_adv.winograd_conv2d_out)
def _operations_out(input: Any, weight: Any, *args: Any, **_: Any) -> int:
    out = args[-2]  # before gate_out
    return 2 * 9 * weight[2] * out[0] * out[1] * out[2] * out[3]


@register_flop_formula(torch.ops.sparse_adv.winograd_conv2d_grad_weight)
def _operations_of_grad_weight(grad: Any, input: Any, *_: Any, **__: Any) -> int:
    return 2 * 9 * grad[0] * grad[1] * grad[2] * grad[3] * input[1]


@torch.library.register_fake("sparse_adv::winograd_conv2d_weight")
def _(weight: Tensor, tile: int, transposed: bool) -> Tensor:
    out_channels, in_channels = weight.shape[:2]
    if transposed:
        out_channels, in_channels = in_channels, out_channels
    return weight.new_empty((tile + 2) ** 2, -(-out_channels // PANEL), in_channels, PANEL)


returns_nothing("winograd_conv2d_out")
