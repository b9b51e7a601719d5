"""The attack of Carlini and Wagner for l2: the squared distance and a loss, minimised together by Adam."""

from __future__ import annotations

import math
from typing import Unpack

import torch
from torch import Tensor

from sparse_adv.argument_types import check_count
from sparse_adv.attacks.as_module import Model
from sparse_adv.attacks.ball import Ball, ball_around
from sparse_adv.attacks.geometry import distance, per_image
from sparse_adv.attacks.host_attack import HostAttack
from sparse_adv.attacks.options import BasicOptions
from sparse_adv.attacks.queries import Queries, run_search
from sparse_adv.attacks.success import advantage, robust_images
from sparse_adv.ops.arguments import check_flag, check_numbers

_INSIDE = 1 - 1e-6
"""Largest |tanh(w)| at the start: at 1, the ends of the range, the gradient of w would vanish."""


def cw(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    c: float = 1.0,
    kappa: float = 0.0,
    steps: int = 50,
    lr: float = 0.01,
    binary_search_steps: int = 1,
    targeted: bool = False,
    lo: float | Tensor = 0.0,
    hi: float | Tensor = 1.0,
    check: bool = True,
    engine: bool = True,
) -> Tensor:
    """CW: minimise |x(w) - x|_2^2 + c * max(z_y - max_{k!=y} z_k, -kappa), with x(w) = lo + (hi - lo)(tanh(w) + 1) / 2.

    Adam minimises this over w, starting from x(w) = x. It returns the nearest x(w) at which another logit exceeds the
    label's by kappa or more. With several binary_search_steps, the next c of an image is the mean of the greatest c
    that failed and the least that succeeded, or ten times the last c as long as none succeeded.

    Args:
        model: maps images in [lo, hi] to logits [N, classes].
        images: float tensor [N, ...], the clean images x.
        labels: integer tensor [N]: the true classes, or the classes t to reach if targeted. Then the loss is
            max(max_{k!=t} z_k - z_t, -kappa).
        c: weight of the loss; the first of a binary search.
        kappa: by how much a result must be adversarial, in units of the logits.
        steps: steps of Adam for each c; each is one forward and one backward pass.
        lr: learning rate of Adam.
        binary_search_steps: number of values of c.
        targeted: search for images of the classes `labels` instead of images of other classes.
        lo, hi: range of pixel values: a number, or a float tensor [C] of one for each channel.
        check: check the values of images and labels.
        engine: whether the engine may compute the gradients, see `sparse_adv.engine`.

    Returns:
        The adversarial images, detached, with shape, dtype and memory format of `images`, in [lo, hi], at any distance;
        the clean image if none was found or the clean image is adversarial.

    Raises:
        TypeError: if model cannot be called, images are not floating point or labels not integers.
        ValueError: if a value or shape is out of range.

    Source: Carlini and Wagner, "Towards evaluating the robustness of neural networks" (S&P 2017), sections V and VI.A.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> model = models.build("digits_cnn", width=8)
        >>> images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
        >>> attacks.cw(model, images, labels, c=10.0, steps=5).shape
        torch.Size([4, 1, 8, 8])
    """
    check_flag("targeted", targeted)
    box = ball_around(images, math.inf, "l2", lo, hi)
    check_count("steps", steps, least=1)
    check_count("binary_search_steps", binary_search_steps, least=1)
    check_numbers(c=c, lr=lr, kappa=kappa)
    for name, bound in (("lo", lo), ("hi", hi)):
        if not bool(torch.as_tensor(bound, device="cpu").isfinite().all()):
            raise ValueError(f"{name} must be finite, because x(w) moves between lo and hi, got {bound}")
    for name, value in (("c", c), ("lr", lr)):
        if not 0 < value < torch.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")
    if not 0 <= kappa < torch.inf:
        raise ValueError(f"kappa must be finite and not negative, got {kappa}")

    def search(model: Queries, images: Tensor, labels: Tensor) -> Tensor:
        best = images.clone()
        index = robust_images(model.logits(images), labels, targeted)
        clean, labels = images[index], labels[index]
        least = clean.new_full(labels.shape, torch.inf, dtype=torch.float64)
        weight, failed, succeeded = torch.full_like(least, c), torch.zeros_like(least), least.clone()
        for _ in range(binary_search_steps if len(index) else 0):
            found, length = _minimise(model, clean, labels, weight, kappa, steps, lr, targeted, box)
            better = length < least
            best[index[better]], least = found[better], length.minimum(least)
            success = length < torch.inf
            succeeded, failed = weight.where(success, succeeded), weight.where(~success, failed)
            weight = torch.where(succeeded < torch.inf, (failed + succeeded) / 2, 10 * weight)
        return best

    return run_search(search, model, images, labels, lo, hi, check, engine)


def _minimise(
    model: Queries,
    images: Tensor,
    labels: Tensor,
    weight: Tensor,
    kappa: float,
    steps: int,
    lr: float,
    targeted: bool,
    box: Ball,
) -> tuple[Tensor, Tensor]:
    """For one c per image: the nearest images that are adversarial by kappa, and their l2 distances or inf."""
    # 16 bits can represent neither _INSIDE nor Adam's sums.
    wide = torch.promote_types(images.dtype, torch.float32)
    lo, span = box.lo, torch.as_tensor(box.hi - box.lo, dtype=wide, device=images.device)
    # Where lo = hi, w has no effect; the divisor 1 avoids a division by zero.
    w = torch.atanh(((images.to(wide) - lo) / span.where(span > 0, 1) * 2 - 1).clamp(-1, 1) * _INSIDE)
    adam = torch.optim.Adam([w], lr=lr)
    best, least = images.clone(), torch.full_like(weight, torch.inf)
    for _ in range(steps):
        tanh = w.tanh()
        adv = box.clamp((lo + span * (tanh + 1) / 2).to(images.dtype))
        gains: list[Tensor] = []

        def loss(logits: Tensor, gains: list[Tensor] = gains) -> Tensor:
            gain = advantage(logits, labels, targeted)
            gains.append(gain.detach())
            return weight * (-gain).clamp_min(-kappa)

        slope = model.gradient(adv, loss) + 2 * (adv.to(wide) - images)
        length = distance(adv, images, "l2").double()
        better = (gains[0] > 0) & (gains[0] >= kappa) & (length < least)
        best, least = adv.where(per_image(better, adv), best), length.where(better, least)
        w.grad = slope * span / 2 * (1 - tanh.square())
        with torch.device("cpu"):  # Adam counts its steps here; torch 2.10 would use the default device
            adam.step()
    return best, least


class CW(HostAttack):
    """`attacks.cw` bound to a model, with the interface of torchattacks.CW.

    Args:
        model, c, kappa, steps, lr, binary_search_steps, options: as in `attacks.cw`.

    Raises:
        TypeError, ValueError: when called, as `attacks.cw`.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> attack = attacks.CW(models.build("digits_cnn", width=8), c=10, steps=3)
        >>> attack(torch.rand(2, 1, 8, 8), torch.tensor([0, 1])).shape
        torch.Size([2, 1, 8, 8])
    """

    _function = staticmethod(cw)

    def __init__(
        self,
        model: Model,
        c: float = 1.0,
        kappa: float = 0.0,
        steps: int = 50,
        lr: float = 0.01,
        *,
        binary_search_steps: int = 1,
        **options: Unpack[BasicOptions],
    ) -> None:
        super().__init__(model, **options)
        self.c, self.kappa, self.steps, self.lr = c, kappa, steps, lr
        self.binary_search_steps = binary_search_steps
