"""R+FGSM: a step in a random direction, then steps along the gradient."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from sparse_adv.argument_types import check_count
from sparse_adv.attacks import movement
from sparse_adv.attacks.as_module import Model
from sparse_adv.attacks.ball import ball_around, into_ball, step_sizes
from sparse_adv.attacks.generators import private_generator
from sparse_adv.attacks.host_attack import HostAttack
from sparse_adv.attacks.losses import Loss, loss_function, loss_to_raise
from sparse_adv.attacks.options import BasicOptions
from sparse_adv.attacks.queries import Queries, run_search
from sparse_adv.ops.arguments import check_flag


def rfgsm(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor = 8 / 255,
    alpha: float | Tensor = 4 / 255,
    steps: int = 1,
    loss: str | Loss = "ce",
    targeted: bool = False,
    generator: torch.Generator | None = None,
    lo: float | Tensor = 0.0,
    hi: float | Tensor = 1.0,
    check: bool = True,
    engine: bool = True,
) -> Tensor:
    """R+FGSM: adv = x + alpha * sign(N(0, 1)), then adv = project(adv + (eps - alpha) * sign(gradient)).

    project returns the nearest point of the linf ball, within [lo, hi].

    Args:
        model: maps images in [lo, hi] to logits [N, classes].
        images: float tensor [N, ...], the clean images.
        labels: integer tensor [N]: the true classes, or the classes to reach if targeted.
        eps: radius of the ball around each image, in units of the images: a number, or a float tensor [N] of one for
            each image.
        alpha: size of the random step, at most eps: a number, or a float tensor [N].
        steps: number of steps of size eps - alpha; 1 in the paper, 10 by default in torchattacks.
        loss: as in `attacks.pgd`.
        targeted: minimise the loss instead of maximising it.
        generator: one number is drawn from it; None for PyTorch's global generator.
        lo, hi: range of pixel values: a number, or a float tensor [C] of one for each channel.
        check: check the values of images and labels.
        engine: whether the engine may compute the gradients, see `sparse_adv.engine`.

    Returns:
        The adversarial images, detached, with shape, dtype and memory format of `images`, without slack in the ball and
        in [lo, hi].

    Raises:
        TypeError: if model cannot be called, images are not floating point or labels not integers.
        ValueError: if a value, shape or name is out of range.

    Source: Tramèr et al., "Ensemble adversarial training: attacks and defenses" (ICLR 2018), equation 7.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> model = models.build("digits_cnn", width=8)
        >>> images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
        >>> adv = attacks.rfgsm(model, images, labels, eps=0.2, alpha=0.1)
        >>> bool((adv - images).abs().max() <= 0.2)
        True
    """
    check_flag("targeted", targeted)
    ball = ball_around(images, eps, "linf", lo, hi)
    whole, first = step_sizes(images, eps), step_sizes(images, alpha)
    if not bool(torch.as_tensor((first >= 0) & (first <= whole), device="cpu").all()):
        raise ValueError(f"alpha must lie between 0 and eps, {eps}, got {alpha}")
    check_count("steps", steps, least=0)
    loss_function(loss)
    draw = private_generator(generator, images)

    def search(model: Queries, images: Tensor, labels: Tensor) -> Tensor:
        raised = loss_to_raise(loss, labels, targeted)
        noise = torch.randn(images.shape, generator=draw, dtype=images.dtype, device=images.device)
        adv = ball.clamp(images + first * noise.sign())
        for _ in range(steps):
            adv = movement.step(adv, model.gradient(adv, raised), images, whole - first, ball)
        return into_ball(adv, images, ball)

    return run_search(search, model, images, labels, lo, hi, check, engine)


class RFGSM(HostAttack):
    """`attacks.rfgsm` bound to a model, with the interface of torchattacks.RFGSM.

    Args:
        model, eps, alpha, steps, loss, targeted, options: as in `attacks.rfgsm`, with the defaults of torchattacks.

    Raises:
        TypeError, ValueError: when called, as `attacks.rfgsm`.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> attack = attacks.RFGSM(models.build("digits_cnn", width=8), eps=0.2, alpha=0.1)
        >>> attack(torch.rand(2, 1, 8, 8), torch.tensor([0, 1])).shape
        torch.Size([2, 1, 8, 8])
    """

    _function = staticmethod(rfgsm)

    def __init__(
        self,
        model: Model,
        eps: float | Tensor = 8 / 255,
        alpha: float | Tensor = 2 / 255,
        steps: int = 10,
        *,
        loss: str | Loss = "ce",
        targeted: bool = False,
        **options: Unpack[BasicOptions],
    ) -> None:
        super().__init__(model, **options)
        self.eps, self.alpha, self.steps = eps, alpha, steps
        self.loss, self.targeted = loss, targeted
