"""The start and the steps of PGD: the fused ops, or PyTorch around them where images or channels have own values."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_adv import ops
from sparse_adv.attacks.geometry import distance, per_image
from sparse_adv.attacks.options import Ball

Values = float | Tensor
"""One number, or a tensor of one for each image [N] (eps, alpha) or each channel [C] (lo, hi)."""


def start(images: Tensor, ball: Ball, philox_state: Tensor) -> Tensor:
    """A random point of each image's ball, clamped to the range of pixel values.

    Args:
        images: float tensor [N, ...], the clean images.
        ball: its eps may be a tensor [N], its lo and hi tensors [C].
        philox_state: int64 tensor [2], see `ops.random_start`.
    """
    if not _varies(*ball):
        return ops.random_start(images, ball.eps, ball.norm, philox_state, ball.lo, ball.hi)
    unit = ops.random_start(torch.zeros_like(images), 1.0, ball.norm, philox_state, -math.inf, math.inf)
    return _clamped(images.detach() + _of_images(ball.eps, images) * unit, ball)


def step(adv: Tensor, grad: Tensor, images: Tensor, alpha: Values, ball: Ball, index: Tensor) -> Tensor:
    """One step along the gradient, projected onto each image's ball and clamped.

    Args:
        adv, grad, images: float tensors [n, ...], as in `ops.pgd_step`.
        alpha: step size, a number or a tensor [N].
        ball: its eps may be a tensor [N], its lo and hi tensors [C].
        index: int64 tensor [n], which of the N images these are.
    """
    if not isinstance(alpha, Tensor) and not _varies(*ball):
        return ops.pgd_step(adv, grad, images, alpha, *ball)
    zero = torch.zeros_like(adv)
    direction = ops.pgd_step(zero, grad, zero, 1.0, math.inf, ball.norm, -math.inf, math.inf)
    moved = adv + _of_images(alpha, images, index) * direction
    eps = _of_images(ball.eps, images, index)
    if ball.norm == "linf":
        return _clamped(torch.minimum(torch.maximum(moved, images - eps), images + eps), ball)
    length = per_image(distance(moved, images, "l2"), images)
    return _clamped(moved.where(length <= eps, images + (moved - images) * (eps / length)), ball)


def check_shapes(images: Tensor, **values: Values) -> None:
    """Raise ValueError unless tensors have one value for each image (eps, alpha) or for each channel (lo, hi)."""
    for name, value in values.items():
        wanted, of = (images.shape[:1], "image") if name in ("eps", "alpha") else (images.shape[1:2], "channel")
        if isinstance(value, Tensor) and value.shape != wanted:
            raise ValueError(f"{name} must have one value for each {of}, shape {list(wanted)}, got {list(value.shape)}")


def _varies(*values: object) -> bool:
    return any(isinstance(value, Tensor) for value in values)


def _of_images(value: Values, images: Tensor, index: Tensor | None = None) -> Values:
    if not isinstance(value, Tensor):
        return value
    value = value.to(images)
    return per_image(value if index is None else value[index], images)


def _clamped(x: Tensor, ball: Ball) -> Tensor:
    for bound, clamp in ((ball.lo, torch.maximum), (ball.hi, torch.minimum)):
        of_channels = torch.as_tensor(bound).to(x)
        x = clamp(x, of_channels.view(-1, *[1] * (x.dim() - 2)) if of_channels.dim() else of_channels)
    return x
