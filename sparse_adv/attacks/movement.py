"""The start and the steps of PGD: fused ops, with PyTorch code around them if eps, alpha, lo or hi is a tensor."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_adv import ops
from sparse_adv.attacks.ball import Ball, Values, check_finite_radius
from sparse_adv.attacks.geometry import distance, per_image


def start(images: Tensor, ball: Ball, philox_state: Tensor) -> Tensor:
    """A random point of each image's ball, clamped to the range of pixel values.

    Args:
        images: float tensor [N, ...], the clean images.
        ball: the ball `on` these images.
        philox_state: int64 tensor [2], see `ops.random_start`.
    """
    eps, norm, lo, hi = ball
    if not (isinstance(eps, Tensor) or isinstance(lo, Tensor) or isinstance(hi, Tensor)):
        return ops.random_start(images, eps, norm=norm, seed=philox_state, lo=lo, hi=hi)
    check_finite_radius(eps)
    unit = ops.random_start(torch.zeros_like(images), 1.0, norm=norm, seed=philox_state, lo=-math.inf, hi=math.inf)
    return ball.clamp(images.detach() + eps * unit)


def advance(philox_state: Tensor, images: Tensor) -> None:
    """Advance the state past the random numbers that `start` used for these images: a Philox block gives four."""
    philox_state[1:].add_((images.numel() + 3) // 4)


def step(adv: Tensor, grad: Tensor, images: Tensor, alpha: Values, ball: Ball) -> Tensor:
    """One step along the gradient, projected onto each image's ball and clamped.

    Args:
        adv, grad, images: float tensors [n, ...], as in `ops.pgd_step`.
        alpha: step size, a number or a tensor that broadcasts with the images.
        ball: the ball `of` these images.
    """
    eps, norm, lo, hi = ball
    if not any(isinstance(value, Tensor) for value in (alpha, eps, lo, hi)):
        return ops.pgd_step(adv, grad, images, alpha=alpha, eps=eps, norm=norm, lo=lo, hi=hi)  # type: ignore[arg-type]
    zero = torch.zeros_like(adv)
    direction = ops.pgd_step(zero, grad, zero, alpha=1.0, eps=math.inf, norm=norm, lo=-math.inf, hi=math.inf)
    moved = adv + alpha * direction
    if norm == "linf":
        return ball.clamp(torch.minimum(torch.maximum(moved, images - eps), images + eps))
    length = per_image(distance(moved, images, "l2"), images)
    return ball.clamp(moved.where(length <= eps, images + (moved - images) * (eps / length)))
