"""MI-FGSM, the iterative method with momentum."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from sparse_adv.argument_types import check_count
from sparse_adv.attacks import movement
from sparse_adv.attacks.as_module import Model
from sparse_adv.attacks.ball import ball_around, into_ball, step_sizes
from sparse_adv.attacks.geometry import direction, per_image
from sparse_adv.attacks.host_attack import HostAttack
from sparse_adv.attacks.losses import Loss, loss_function, loss_to_raise
from sparse_adv.attacks.options import BasicOptions
from sparse_adv.attacks.queries import Queries, run_search
from sparse_adv.ops.arguments import check_flag, check_number


def mifgsm(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor = 8 / 255,
    alpha: float | Tensor = 2 / 255,
    steps: int = 10,
    decay: float = 1.0,
    norm: str = "linf",
    loss: str | Loss = "ce",
    targeted: bool = False,
    lo: float | Tensor = 0.0,
    hi: float | Tensor = 1.0,
    check: bool = True,
    engine: bool = True,
) -> Tensor:
    """MI-FGSM: g = decay * g + gradient / |gradient|_1 and adv = project(adv + alpha * direction(g)), `steps` times.

    direction(g) is sign(g) for linf and g / |g| of each image for l2. The start is the clean image.

    Args:
        model: maps images in [lo, hi] to logits [N, classes].
        images: float tensor [N, ...], the clean images.
        labels: integer tensor [N]: the true classes, or the classes to reach if targeted.
        eps: radius of the ball around each image, in units of the images: a number, or a float tensor [N] of one for
            each image.
        alpha: step size, in units of the images: a number, or a float tensor [N].
        steps: number of steps; each is one forward and one backward pass.
        decay: how much of the momentum g a step keeps, mu in the paper.
        norm: "linf" or "l2", also written "Linf" or "L2".
        loss: as in `attacks.pgd`.
        targeted: minimise the loss instead of maximising it.
        lo, hi: range of pixel values: a number, or a float tensor [C] of one for each channel.
        check: check the values of images and labels.
        engine: whether the engine may compute the gradients, see `sparse_adv.engine`.

    Returns:
        The adversarial images, detached, with shape, dtype and memory format of `images`, without slack in the ball and
        in [lo, hi].

    Raises:
        TypeError: if model cannot be called, images are not floating point or labels not integers.
        ValueError: if a value, shape or name is out of range.

    Source: Dong et al., "Boosting adversarial attacks with momentum" (CVPR 2018), algorithm 1.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> model = models.build("digits_cnn", width=8)
        >>> images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
        >>> adv = attacks.mifgsm(model, images, labels, eps=0.2, alpha=0.05)
        >>> bool((adv - images).abs().max() <= 0.2)
        True
    """
    check_flag("targeted", targeted)
    ball, size = ball_around(images, eps, norm, lo, hi), step_sizes(images, alpha)
    check_count("steps", steps, least=0)
    check_number("decay", decay)
    if not 0 <= decay < torch.inf:
        raise ValueError(f"decay must be finite and not negative, got {decay}")
    loss_function(loss)

    def search(model: Queries, images: Tensor, labels: Tensor) -> Tensor:
        raised = loss_to_raise(loss, labels, targeted)
        # 16 bits can represent neither the l1 norm of a large image nor one pixel's share of it.
        wide = torch.promote_types(images.dtype, torch.float32)
        adv, momentum = images, torch.zeros_like(images, dtype=wide)
        for _ in range(steps):
            gradient = model.gradient(adv, raised).to(wide)
            length = gradient.abs().flatten(1).sum(1)
            momentum = decay * momentum + gradient / per_image(length.where(length > 0, 1), gradient)
            adv = movement.step(adv, direction(momentum, ball.norm).to(images.dtype), images, size, ball)
        return into_ball(adv, images, ball)

    return run_search(search, model, images, labels, lo, hi, check, engine)


class MIFGSM(HostAttack):
    """`attacks.mifgsm` bound to a model, with the interface of torchattacks.MIFGSM.

    Args:
        model, eps, alpha, steps, decay, norm, loss, targeted, options: as in `attacks.mifgsm`.

    Raises:
        TypeError, ValueError: when called, as `attacks.mifgsm`.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> attack = attacks.MIFGSM(models.build("digits_cnn", width=8), eps=0.2, steps=3)
        >>> attack(torch.rand(2, 1, 8, 8), torch.tensor([0, 1])).shape
        torch.Size([2, 1, 8, 8])
    """

    _function = staticmethod(mifgsm)

    def __init__(
        self,
        model: Model,
        eps: float | Tensor = 8 / 255,
        alpha: float | Tensor = 2 / 255,
        steps: int = 10,
        decay: float = 1.0,
        *,
        norm: str = "linf",
        loss: str | Loss = "ce",
        targeted: bool = False,
        **options: Unpack[BasicOptions],
    ) -> None:
        super().__init__(model, **options)
        self.eps, self.alpha, self.steps, self.decay = eps, alpha, steps, decay
        self.norm, self.loss, self.targeted = norm, loss, targeted
