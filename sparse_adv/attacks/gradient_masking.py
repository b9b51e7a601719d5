"""Signs that a robust accuracy cannot be trusted, because gradients tell the attacks too little."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_adv.attacks import movement
from sparse_adv.attacks.as_module import Model, as_module
from sparse_adv.attacks.ball import Ball, Values, ball_around, check_finite_radius
from sparse_adv.attacks.checks import check_classes, check_images, check_labels, count_classes, int64_labels
from sparse_adv.attacks.modes import in_mode
from sparse_adv.attacks.success import is_correct
from sparse_adv.engine import Autograd, NoGradientError

_TOO_MANY = 0.1
"""If the gradient is zero at more than this fraction of the images, a warning is given."""
_CHANCE = 0.05
"""A robust accuracy may rise by this fraction of the images by chance."""
_STEPS = 10


def signs_of_masking(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: Values | None = None,
    norm: str = "linf",
    lo: Values = 0.0,
    hi: Values = 1.0,
) -> list[str]:
    """Look for outputs and gradients on which gradient attacks, and AutoAttack, are known to fail.

    The signs are logits that differ between two equal calls, outputs that are probabilities (in [0, 1]), NaN or
    infinite, outputs without a gradient, and images at which the gradient of the cross-entropy is zero. With eps, PGD
    with 10 steps of eps / 4 from the clean images runs in two balls. Its loss must be higher after the last step than
    after the first, a ball of 2 eps must not leave more images robust, and 10 random directions of length eps must not
    break images that PGD leaves robust.

    Args:
        model: maps images to logits [N, classes]; a module or a plain function.
        images: float tensor [N, ...], N at least 1.
        labels: integer tensor [N].
        eps, norm, lo, hi: ball of the attacks, as in `attacks.pgd`, with a finite eps; eps None for no attack.

    Returns:
        One sentence for each sign. No sign is no proof that there is no masking.

    Raises:
        TypeError, ValueError: if the model's output is not logits [N, classes], a label is not one of these classes, or
            the ball is invalid.

    Source: Croce and Hein (ICML 2020), section 5; Carlini et al., "On evaluating adversarial robustness" (2019),
    section 3; Athalye et al., "Obfuscated gradients give a false sense of security" (ICML 2018), section 3.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> net = models.build("digits_cnn", width=8)
        >>> images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
        >>> attacks.signs_of_masking(net, images, labels, eps=0.1)
        []
        >>> attacks.signs_of_masking(lambda x: net(x).softmax(1), images, labels)
        ['the outputs are probabilities and not logits: attacks need the values before the softmax']
    """
    module, _ = as_module(model)
    labels = int64_labels(labels)
    check_images(images)
    check_labels(images, labels)
    if not len(images):
        raise ValueError("images must hold at least one image, got none")
    ball = None if eps is None else ball_around(images, eps, norm, lo, hi)
    if ball is not None:
        check_finite_radius(ball.eps)
    found = []
    with torch.inference_mode(False), in_mode(module, "eval") as model:
        reference = Autograd(model)
        images, labels = images.detach().clone(), labels.detach().clone()
        logits, again = reference.logits(images), reference.logits(images)
        check_classes(labels, count_classes(logits, len(images)))
        for which, words in ((logits.isnan(), "NaN: they count as wrong"), (logits.isinf(), "infinite")):
            if which.any():
                found.append(f"the outputs of {int(which.any(1).sum())} of {len(images)} images are {words}")
        random = not torch.equal(logits.nan_to_num(), again.nan_to_num())
        if random:
            found.append(
                'the outputs differ between two calls: average gradients (eot_iter, AutoAttack\'s version "rand")'
            )
        if bool(((logits >= 0) & (logits <= 1)).all()):
            last = "softmax" if bool(((logits.sum(1) - 1).abs() < 1e-3).all()) else "sigmoid"
            found.append(f"the outputs are probabilities and not logits: attacks need the values before the {last}")
        try:
            gradient = reference.gradient(images, lambda logits: F.cross_entropy(logits, labels, reduction="none"))
        except NoGradientError:
            return [*found, "the outputs have no gradient: only attacks without gradients, such as square, can be run"]
        zero = int((gradient.flatten(1).nan_to_num() == 0).all(1).sum())
        if zero > _TOO_MANY * len(images):
            found.append(f"the gradient is zero at {zero} of {len(images)} images: gradient attacks cannot move them")
        elif ball is not None and not random:
            found += _signs_of_attacks(reference, images, labels, ball)
    return found


def _signs_of_attacks(reference: Autograd, images: Tensor, labels: Tensor, ball: Ball) -> Iterator[str]:
    """Compare the steps of an attack, and attacks in a ball and in a ball twice as large."""
    first, last, stands = _attacked(reference, images, labels, ball)
    robust = int(stands.sum())
    if last < first:
        yield (
            f"the loss of PGD does not rise with its steps: {first:.3g} after the first, {last:.3g} after {_STEPS}; "
            "attacks from random starts, or without gradients, may find more"
        )
    random = torch.Generator().manual_seed(0)
    by_chance = torch.zeros_like(stands)
    for _ in range(_STEPS):
        direction = torch.randn(images.shape, generator=random, dtype=images.dtype, device="cpu").to(images.device)
        noisy = movement.step(images, direction, images, ball.eps, ball)
        by_chance |= stands & ~is_correct(reference.logits(noisy), labels)
    if by_chance.sum() > _CHANCE * len(images):
        yield f"random noise breaks {int(by_chance.sum())} of {len(images)} images that PGD, with gradients, does not"
    _, _, stands = _attacked(reference, images, labels, ball._replace(eps=2 * ball.eps))
    robust_in_larger = int(stands.sum())
    if robust_in_larger > robust + _CHANCE * len(images):
        yield (
            f"robust accuracy rises with eps: PGD leaves {robust} of {len(images)} images robust, and "
            f"{robust_in_larger} where eps is twice as large"
        )


def _attacked(reference: Autograd, images: Tensor, labels: Tensor, ball: Ball) -> tuple[float, float, Tensor]:
    """The mean cross-entropy after the first and the last step of PGD, and which images it leaves robust, bool [N]."""
    adv, losses = images, []
    for _ in range(_STEPS):
        gradient = reference.gradient(adv, lambda logits: F.cross_entropy(logits, labels, reduction="none"))
        adv = movement.step(adv, gradient, images, ball.eps / 4, ball)
        logits = reference.logits(adv)
        losses.append(F.cross_entropy(logits, labels).item())
    return losses[0], losses[-1], is_correct(logits, labels)
