"""Gradients of `masked_conv2d`.

The three ops are closed under differentiation: the convolution is linear in its input and in its weight, so each
gradient of each op is another of the three.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_adv.ops.masked_conv2d_pattern import without_values

Gradient = Tensor | list[None] | None


def _shape_args(ctx: Any) -> tuple[Any, ...]:
    return ctx.stride, ctx.padding, ctx.dilation, ctx.groups


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, pattern, _, ctx.stride, ctx.padding, ctx.dilation, ctx.groups, scale, _, ctx.relu = inputs
    ctx.save_for_backward(input, weight, scale, output if ctx.relu else None, *pattern)


def _backward_forward(ctx: Any, grad: Tensor) -> tuple[Gradient, ...]:
    input, weight, scale, output, *pattern = ctx.saved_tensors
    needs = ctx.needs_input_grad
    needs_input, needs_weight, needs_bias, needs_scale, needs_residual = (needs[i] for i in (0, 1, 3, 8, 9))
    if ctx.relu:
        grad = torch.ops.aten.threshold_backward(grad, output, 0)
    shape = _shape_args(ctx)
    grad_input = grad_weight = grad_scale = None
    if needs_input:
        scaled = grad if scale is None else grad * scale[:, None, None]
        grad_input = torch.ops.sparse_adv.masked_conv2d_grad_input(scaled, weight, pattern, input.shape, *shape)
    if needs_weight or needs_scale:
        grad_weight = torch.ops.sparse_adv.masked_conv2d_grad_weight(grad, input, pattern, *shape)
    if scale is not None and grad_weight is not None:
        # <grad, conv> per channel without the unscaled output: the convolution is linear in the weight.
        grad_scale = torch.where(pattern[1], grad_weight * weight, 0).sum((1, 2, 3))
        grad_weight = torch.where(pattern[1], grad_weight * scale[:, None, None, None], 0)
    return (
        grad_input,
        grad_weight if needs_weight else None,
        [None] * len(pattern),
        grad.sum((0, 2, 3)) if needs_bias else None,
        *[None] * 4,
        grad_scale if needs_scale else None,
        grad if needs_residual else None,
        None,
    )


def _setup_grad_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad_output, weight, pattern, _, ctx.stride, ctx.padding, ctx.dilation, ctx.groups = inputs
    ctx.save_for_backward(grad_output, weight, *pattern)


def _backward_grad_input(ctx: Any, grad: Tensor) -> tuple[Gradient, ...]:
    grad_output, weight, *pattern = ctx.saved_tensors
    shape = _shape_args(ctx)
    needs_grad_output, needs_weight = ctx.needs_input_grad[:2]
    return (
        torch.ops.sparse_adv.masked_conv2d(grad, weight, pattern, None, *shape, None, None, False)
        if needs_grad_output
        else None,
        torch.ops.sparse_adv.masked_conv2d_grad_weight(grad_output, grad, pattern, *shape) if needs_weight else None,
        [None] * len(pattern),
        *[None] * 5,
    )


def _setup_grad_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad_output, input, pattern, ctx.stride, ctx.padding, ctx.dilation, ctx.groups = inputs
    ctx.save_for_backward(grad_output, input, *pattern)


def _backward_grad_weight(ctx: Any, grad: Tensor) -> tuple[Gradient, ...]:
    grad_output, input, *pattern = ctx.saved_tensors
    # Here the gradient takes the weight's place, and values packed for the weight must not.
    pattern = without_values(pattern)
    shape = _shape_args(ctx)
    needs_grad_output, needs_input = ctx.needs_input_grad[:2]
    return (
        torch.ops.sparse_adv.masked_conv2d(input, grad, pattern, None, *shape, None, None, False)
        if needs_grad_output
        else None,
        torch.ops.sparse_adv.masked_conv2d_grad_input(grad_output, grad, pattern, input.shape, *shape)
        if needs_input
        else None,
        [None] * len(ctx.saved_tensors[2:]),
        *[None] * 4,
    )


torch.library.register_autograd("sparse_adv::masked_conv2d", _backward_forward, setup_context=_setup_forward)
torch.library.register_autograd(
    "sparse_adv::masked_conv2d_grad_input", _backward_grad_input, setup_context=_setup_grad_input
)
torch.library.register_autograd(
    "sparse_adv::masked_conv2d_grad_weight", _backward_grad_weight, setup_context=_setup_grad_weight
)
