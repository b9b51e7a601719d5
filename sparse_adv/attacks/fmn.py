"""FMN, the fast minimum-norm attack: gradient steps within a ball whose radius adapts until it touches the boundary."""

from __future__ import annotations

import math
from typing import Unpack

import torch
from torch import Tensor

from sparse_adv.argument_types import check_count, shortened
from sparse_adv.attacks.as_module import Model
from sparse_adv.attacks.ball import Ball, ball_around
from sparse_adv.attacks.confirmation import confirmed
from sparse_adv.attacks.geometry import distance, divisor, l2_unit, per_image
from sparse_adv.attacks.host_attack import HostAttack
from sparse_adv.attacks.losses import loss_to_raise
from sparse_adv.attacks.options import BasicOptions
from sparse_adv.attacks.queries import Queries, run_search
from sparse_adv.attacks.success import robust_images
from sparse_adv.ops.arguments import check_flag, check_numbers

LOSSES = ("margin", "dlr")
"""The losses that are 0 on the boundary, so that their linearisation estimates the distance to it."""

_GAMMA_LAST = 0.001
_ALPHA_FALLS = 100


def fmn(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    norm: str = "linf",
    steps: int = 100,
    alpha: float = 1.0,
    gamma: float = 0.05,
    loss: str = "margin",
    targeted: bool = False,
    lo: float | Tensor = 0.0,
    hi: float | Tensor = 1.0,
    check: bool = True,
    engine: bool = True,
) -> Tensor:
    """FMN: x = box(project(x + alpha_k g / |g|_2, ball(x_0, eps_k))), with loss gradient g and an adaptive eps_k.

    Before the first success eps_k = (1 + gamma_k) max(eps, |x - x_0| + |loss| / |g|_dual), just over the linearised
    boundary. (The paper has neither the factor nor the maximum. If the box shortens steps, x then creeps up to the
    boundary and never crosses it: with l2 for 41 of 100 digits.) Later, a step that finds x adversarial reduces eps_k
    to min((1 - gamma_k) eps, the least distance found), and any other step enlarges it to (1 + gamma_k) eps. alpha_k
    falls from alpha to alpha / 100 and gamma_k from gamma to 0.001, both by half a cosine. If an example is so near to
    the boundary that rounding decides, it is moved further by up to 1 % of its distance.

    Args:
        model: maps images in [lo, hi] to logits [N, classes].
        images: float tensor [N, ...], the clean images x_0.
        labels: integer tensor [N]: the true classes, or the classes to reach if targeted.
        norm: "linf" or "l2", also written "Linf" or "L2".
        steps: number of steps; each is one forward and one backward pass.
        alpha: first step size, as an l2 norm in units of the images.
        gamma: share by which the radius changes at first, in (0, 1).
        loss: "margin" or "dlr", see `attacks.losses`.
        targeted: search for images of the classes `labels`.
        lo, hi: range of pixel values: a number, or a float tensor [C] of one for each channel.
        check: check the values of images and labels.
        engine: whether the engine may compute the gradients, see `sparse_adv.engine`.

    Returns:
        The nearest adversarial images found, detached, with shape, dtype and memory format of `images`, in [lo, hi];
        the clean image if none was found or the clean image is adversarial. `distances` distinguishes these two cases.

    Raises:
        TypeError: if model cannot be called, images are not floating point or labels not integers.
        ValueError: if a value, shape or name is out of range, or the model has fewer classes than "dlr" needs, 3.

    Source: Pintor et al., "Fast minimum-norm adversarial attacks through adaptive norm constraints" (NeurIPS 2021),
    algorithm 1, from the clean images.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> model = models.build("digits_cnn", width=8)
        >>> images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
        >>> adv = attacks.fmn(model, images, labels, norm="l2", steps=10)
        >>> attacks.distances(model, adv, images, labels, norm="l2").shape
        torch.Size([4])
    """
    check_flag("targeted", targeted)
    box = ball_around(images, math.inf, norm, lo, hi)
    check_count("steps", steps, least=1)
    check_numbers(alpha=alpha, gamma=gamma)
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be positive and finite, got {alpha}")
    if not 0 < gamma < 1:
        raise ValueError(f"gamma must lie between 0 and 1, got {gamma}")
    if not isinstance(loss, str) or loss not in LOSSES:
        raise ValueError(f"loss must be {' or '.join(map(repr, LOSSES))}, got {shortened(loss)}")

    def search(model: Queries, images: Tensor, labels: Tensor) -> Tensor:
        best = images.clone()
        logits = model.logits(images)
        loss_to_raise(loss, labels, targeted)(logits)  # raises if there are too few classes, even if none is robust
        index = robust_images(logits, labels, targeted)
        if len(index):
            best[index] = _nearest(model, images[index], labels[index], box, steps, alpha, gamma, loss, targeted)
        return confirmed(model, best, images, labels, box, targeted)

    return run_search(search, model, images, labels, lo, hi, check, engine)


def _nearest(
    model: Queries,
    images: Tensor,
    labels: Tensor,
    box: Ball,
    steps: int,
    alpha: float,
    gamma: float,
    loss: str,
    targeted: bool,
) -> Tensor:
    rising = loss_to_raise(loss, labels, targeted)
    widest = distance(torch.maximum(images - box.lo, box.hi - images), torch.zeros_like(images), box.norm).double()
    eps, least = torch.zeros_like(widest), torch.full_like(widest, math.inf)
    best, adv = images.clone(), images
    for step in range(steps):
        cosine = (1 + math.cos(math.pi * step / steps)) / 2
        size = alpha / _ALPHA_FALLS + (alpha - alpha / _ALPHA_FALLS) * cosine
        share = _GAMMA_LAST + (gamma - _GAMMA_LAST) * cosine
        value, slope = model.values_and_gradient(adv, rising)
        value = value.masked_fill(value.isnan(), -math.inf if targeted else math.inf)  # as in `advantage`
        length, is_adversarial = distance(adv, images, box.norm).double(), value > 0
        nearer = is_adversarial & (length < least)
        best, least = adv.where(per_image(nearer, adv), best), length.where(nearer, least)
        dual = torch.linalg.vector_norm(slope.flatten(1), 1 if box.norm == "linf" else 2, dim=1)
        ahead = length + value.abs() / divisor(dual).double()
        grown = torch.where(least < math.inf, eps, ahead.maximum(eps)) * (1 + share)
        eps = torch.where(is_adversarial, torch.minimum(eps * (1 - share), least), grown).minimum(widest)
        adv = box.clamp(_into(adv + size * l2_unit(slope), images, eps, box.norm))
    return best


def _into(x: Tensor, images: Tensor, eps: Tensor, norm: str) -> Tensor:
    """The nearest points in balls with a radius for each image."""
    radius, offset = per_image(eps, x).to(x.dtype), x - images
    if norm == "linf":
        return images + offset.clamp(-radius, radius)
    return images + offset * (radius / per_image(divisor(distance(x, images, norm)), x)).clamp(max=1)


class FMN(HostAttack):
    """`attacks.fmn` bound to a model.

    Args:
        model, norm, steps, alpha, gamma, loss, options: as in `attacks.fmn`.

    Raises:
        TypeError, ValueError: when called, as `attacks.fmn`.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> attack = attacks.FMN(models.build("digits_cnn", width=8), norm="L2", steps=5)
        >>> attack(torch.rand(2, 1, 8, 8), torch.tensor([0, 1])).shape
        torch.Size([2, 1, 8, 8])
    """

    _function = staticmethod(fmn)

    def __init__(
        self,
        model: Model,
        norm: str = "Linf",
        steps: int = 100,
        alpha: float = 1.0,
        gamma: float = 0.05,
        loss: str = "margin",
        **options: Unpack[BasicOptions],
    ) -> None:
        super().__init__(model, **options)
        self.norm, self.steps, self.alpha, self.gamma, self.loss = norm, steps, alpha, gamma, loss
