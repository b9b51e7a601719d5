"""Gradients of `masked_conv2d`.

The three ops are closed under differentiation: the convolution is linear in its input and in its weight, so each
gradient of each op is another of the three.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sparse_adv.ops.autograd import Saved, register_autograd
from sparse_adv.ops.masked_conv2d_pattern import unflatten

_OPS = torch.ops.sparse_adv
Gradients = tuple[Tensor | None, ...]
"""One for each argument of an op, None for constants."""

_masked = WeakTensorKeyDictionary()
"""Maps each weight gradient that an op here computed to its version and the mask outside of which it is 0."""


def is_masked(gradient: Tensor, mask: Tensor) -> bool:
    """Whether a gradient of a weight is known to be 0 where the mask is false.

    It is not known, so the result is False, if autograd has added another gradient to it.
    """
    return _mask_of(gradient) is mask


def _mask_of(gradient: Tensor) -> Tensor | None:
    mask, version = _masked.get(gradient, (None, None))
    return mask if mask is not None and version == gradient._version else None


def keep_known_through(cast: Tensor) -> None:
    """Mark the gradient of a weight as masked if the gradient of its cast to another dtype is known to be."""

    def carry(of_weight: tuple[Tensor | None, ...], of_cast: tuple[Tensor | None, ...]) -> None:
        if of_weight[0] is not None and of_cast[0] is not None:
            mask = _mask_of(of_cast[0])
            if mask is not None:
                _masked[of_weight[0]] = mask, of_weight[0]._version

    if cast.grad_fn is not None:
        cast.grad_fn.register_hook(carry)


_FORWARD, _GRAD_INPUT, _GRAD_WEIGHT = (
    tuple(argument.name for argument in op.default._schema.arguments)
    for op in (_OPS.masked_conv2d, _OPS.masked_conv2d_grad_input, _OPS.masked_conv2d_grad_weight)
)
"""The arguments of each op."""


def _needs(ctx: Any, arguments: Sequence[str]) -> dict[str, bool]:
    return dict(zip(arguments, ctx.needs_input_grad, strict=False))


def _in_order(arguments: Sequence[str], **gradients: Tensor | None) -> Gradients:
    return tuple(map(gradients.get, arguments))


def _shape_args(ctx: Any) -> tuple[Any, ...]:
    return ctx.stride, ctx.padding, ctx.dilation, ctx.groups


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, tensors, _, ctx.stride, ctx.padding, ctx.dilation, ctx.groups, scale, _, ctx.relu = inputs
    ctx.save_for_backward(input, weight, scale, output if ctx.relu else None, *tensors)


def _backward_forward(ctx: Any, saved: Saved, grad: Tensor) -> Gradients:
    input, weight, scale, output, *tensors = saved
    needs, shape = _needs(ctx, _FORWARD), _shape_args(ctx)
    if ctx.relu:
        grad = torch.ops.aten.threshold_backward(grad, output, 0)
    grad_input = grad_weight = grad_scale = None
    if needs["input"]:
        scaled = grad if scale is None else grad * scale[:, None, None]
        grad_input = _OPS.masked_conv2d_grad_input(scaled, weight, tensors, input.shape, *shape)
    if needs["weight"] or needs["scale"]:
        grad_weight = _OPS.masked_conv2d_grad_weight(grad, input, tensors, *shape)
    if scale is not None and grad_weight is not None:
        # The gradient of scale[k] is <grad[k], conv[k]> = <grad_weight[k], weight[k]>, because conv is linear in the
        # weight. So the unscaled output need not be saved.
        mask = unflatten(tensors).mask
        grad_scale = torch.where(mask, grad_weight * weight, 0).sum((1, 2, 3))
        grad_weight = torch.where(mask, grad_weight * scale[:, None, None, None], 0)
    if grad_weight is not None and not torch.compiler.is_compiling():
        _masked[grad_weight] = unflatten(tensors).mask, grad_weight._version
    return _in_order(
        _FORWARD,
        input=grad_input,
        weight=grad_weight if needs["weight"] else None,
        bias=grad.sum((0, 2, 3)) if needs["bias"] else None,
        scale=grad_scale if needs["scale"] else None,
        residual=grad if needs["residual"] else None,
    )


def _setup_grad_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad_output, weight, tensors, _, ctx.stride, ctx.padding, ctx.dilation, ctx.groups = inputs
    ctx.save_for_backward(grad_output, weight, *tensors)


def _backward_grad_input(ctx: Any, saved: Saved, grad: Tensor) -> Gradients:
    grad_output, weight, *tensors = saved
    needs, shape = _needs(ctx, _GRAD_INPUT), _shape_args(ctx)
    grad_grad_output = grad_weight = None
    if needs["grad_output"]:
        grad_grad_output = _OPS.masked_conv2d(grad, weight, tensors, None, *shape, None, None, False)
    if needs["weight"]:
        grad_weight = _OPS.masked_conv2d_grad_weight(grad_output, grad, tensors, *shape)
    return _in_order(_GRAD_INPUT, grad_output=grad_grad_output, weight=grad_weight)


def _setup_grad_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad_output, input, tensors, ctx.stride, ctx.padding, ctx.dilation, ctx.groups = inputs
    ctx.save_for_backward(grad_output, input, *tensors)


def _backward_grad_weight(ctx: Any, saved: Saved, grad: Tensor) -> Gradients:
    grad_output, input, *tensors = saved
    needs, shape = _needs(ctx, _GRAD_WEIGHT), _shape_args(ctx)
    # `grad` is the weight of the ops below, so they must not read the values packed for the layer's weight.
    without_values = unflatten(tensors).without_values().flatten()
    grad_grad_output = grad_input = None
    if needs["grad_output"]:
        grad_grad_output = _OPS.masked_conv2d(input, grad, without_values, None, *shape, None, None, False)
    if needs["input"]:
        grad_input = _OPS.masked_conv2d_grad_input(grad_output, grad, without_values, input.shape, *shape)
    return _in_order(_GRAD_WEIGHT, grad_output=grad_grad_output, input=grad_input)


register_autograd("masked_conv2d", _backward_forward, _setup_forward)
register_autograd("masked_conv2d_grad_input", _backward_grad_input, _setup_grad_input)
register_autograd("masked_conv2d_grad_weight", _backward_grad_weight, _setup_grad_weight)
