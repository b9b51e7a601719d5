"""DeepFool: steps to the nearest linearised boundary, until the image has crossed it."""

from __future__ import annotations

import math
from typing import Unpack

import torch
from torch import Tensor

from sparse_adv.argument_types import check_count
from sparse_adv.attacks.as_module import Model
from sparse_adv.attacks.ball import ball_around
from sparse_adv.attacks.confirmation import confirmed
from sparse_adv.attacks.geometry import per_image
from sparse_adv.attacks.host_attack import HostAttack
from sparse_adv.attacks.hyperplane import nearest_boundary
from sparse_adv.attacks.options import BasicOptions
from sparse_adv.attacks.queries import Queries, run_search
from sparse_adv.attacks.success import robust_images
from sparse_adv.ops.arguments import check_number


def deepfool(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    steps: int = 50,
    overshoot: float = 0.02,
    lo: float | Tensor = 0.0,
    hi: float | Tensor = 1.0,
    check: bool = True,
    engine: bool = True,
) -> Tensor:
    """DeepFool: r = r - (z_y - z_k) / |w|^2 * w at x + r, until the label is not predicted at x + (1 + overshoot) r.

    w is the gradient of z_y - z_k, 0 where it is not finite, and k is the class with the least |z_y - z_k| / |w|_2;
    both points are clamped to [lo, hi]. If clamping shortens steps, x + r creeps up to the boundary and never crosses
    it. The overshoot does cross it, because it is a share of all of r, not only of the last step. If an example is so
    near to the boundary that rounding decides, it is moved further by up to 1 % of its distance.

    Args:
        model: maps images in [lo, hi] to logits [N, classes].
        images: float tensor [N, ...], the clean images x.
        labels: integer tensor [N], the true classes y.
        steps: greatest number of steps; each is two forward passes and one backward pass for every class, with
            autograd.
        overshoot: how far to go past the boundary, as a share of the distance to it; not negative.
        lo, hi: range of pixel values: a number, or a float tensor [C] of one for each channel.
        check: check the values of images and labels.
        engine: whether the engine may compute the logits, see `sparse_adv.engine`.

    Returns:
        The adversarial images, detached, with shape, dtype and memory format of `images`, in [lo, hi], at any distance;
        the clean image if none was found or the clean image is adversarial.

    Raises:
        TypeError: if model cannot be called, images are not floating point or labels not integers.
        ValueError: if a value or shape is out of range.

    Source: Moosavi-Dezfooli et al., "DeepFool: a simple and accurate method to fool deep neural networks" (CVPR 2016),
    algorithm 2.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> model = models.build("digits_cnn", width=8)
        >>> images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
        >>> adv = attacks.deepfool(model, images, labels)
        >>> bool((model.eval()(adv).argmax(1) == labels).any())
        False
    """
    box = ball_around(images, math.inf, "l2", lo, hi)
    check_count("steps", steps, least=0)
    check_number("overshoot", overshoot)
    if not 0 <= overshoot < torch.inf:
        raise ValueError(f"overshoot must be finite and not negative, got {overshoot}")

    def search(model: Queries, images: Tensor, labels: Tensor) -> Tensor:
        adv, way = images.clone(), torch.zeros_like(images)
        index = torch.arange(len(images), device=images.device)
        for _ in range(steps):
            index = index[robust_images(model.logits(adv[index]), labels[index], False)]
            if not len(index):
                break
            x = box.clamp(images[index] + way[index])
            lead, slope = nearest_boundary(model, x, labels[index], "l2")
            square = slope.flatten(1).double().square().sum(1)
            way[index] -= (per_image(lead / square.where(square > 0, 1), slope) * slope).to(way.dtype)
            moved = box.clamp(images[index] + (1 + overshoot) * way[index])
            finite = moved.isfinite().flatten(1).all(1)
            index = index[finite]
            adv[index] = moved[finite]
        return confirmed(model, adv, images, labels, box, False)

    return run_search(search, model, images, labels, lo, hi, check, engine)


class DeepFool(HostAttack):
    """`attacks.deepfool` bound to a model, with the interface of torchattacks.DeepFool; it has no targeted mode.

    Args:
        model, steps, overshoot, options: as in `attacks.deepfool`.

    Raises:
        TypeError, ValueError: when called, as `attacks.deepfool`.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> attack = attacks.DeepFool(models.build("digits_cnn", width=8), steps=5)
        >>> attack(torch.rand(2, 1, 8, 8), torch.tensor([0, 1])).shape
        torch.Size([2, 1, 8, 8])
    """

    _function = staticmethod(deepfool)
    supports_targets = False

    def __init__(self, model: Model, steps: int = 50, overshoot: float = 0.02, **options: Unpack[BasicOptions]) -> None:
        super().__init__(model, **options)
        self.steps, self.overshoot = steps, overshoot
