"""EOT-PGD: projected gradient descent on the mean gradient of a model that draws random numbers."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from sparse_adv.argument_types import check_count
from sparse_adv.attacks import movement
from sparse_adv.attacks.as_module import Model
from sparse_adv.attacks.ball import ball_around, into_ball, step_sizes
from sparse_adv.attacks.host_attack import HostAttack
from sparse_adv.attacks.losses import Loss, loss_function, loss_to_raise
from sparse_adv.attacks.options import BasicOptions, check_generator
from sparse_adv.attacks.queries import Queries, run_search
from sparse_adv.ops.arguments import check_flags
from sparse_adv.ops.random_start import as_philox_state


def eotpgd(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor = 8 / 255,
    alpha: float | Tensor = 2 / 255,
    steps: int = 10,
    eot_iter: int = 2,
    random_start: bool = True,
    norm: str = "linf",
    loss: str | Loss = "ce",
    targeted: bool = False,
    generator: torch.Generator | None = None,
    lo: float | Tensor = 0.0,
    hi: float | Tensor = 1.0,
    check: bool = True,
    engine: bool = True,
) -> Tensor:
    """EOT-PGD: adv = project(adv + alpha * direction(mean of eot_iter gradients at adv)), `steps` times.

    The model draws random numbers anew in each pass; the mean estimates the gradient of the expected loss over them.
    For a model that draws none, this is `attacks.pgd` at eot_iter times its cost.

    Args:
        model: maps images in [lo, hi] to logits [N, classes]. It runs in eval mode, so it must be random in eval mode.
        images: float tensor [N, ...], the clean images.
        labels: integer tensor [N]: the true classes, or the classes to reach if targeted.
        eps: radius of the ball around each image, in units of the images: a number, or a float tensor [N] of one for
            each image.
        alpha: step size, in units of the images: a number, or a float tensor [N].
        steps: number of steps; each is eot_iter forward and backward passes.
        eot_iter: number of gradients in each mean.
        random_start: start at a random point of the ball instead of the clean image.
        norm: "linf" or "l2", also written "Linf" or "L2".
        loss: as in `attacks.pgd`.
        targeted: minimise the loss instead of maximising it.
        generator: one number is drawn from it for the random start; None for PyTorch's global generator.
        lo, hi: range of pixel values: a number, or a float tensor [C] of one for each channel.
        check: check the values of images and labels.
        engine: whether the engine may compute the gradients; it leaves models that draw random numbers to autograd.

    Returns:
        The adversarial images, detached, with shape, dtype and memory format of `images`, without slack in the ball and
        in [lo, hi].

    Raises:
        TypeError: if model cannot be called, images are not floating point or labels not integers.
        ValueError: if a value, shape or name is out of range.

    Source: Athalye et al., "Synthesizing robust adversarial examples" (ICML 2018), section 2.1; Liu et al., "Adv-BNN:
    improved adversarial defense through robust Bayesian neural network" (ICLR 2019), section 4.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> model = models.build("digits_cnn", width=8)
        >>> images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
        >>> adv = attacks.eotpgd(model, images, labels, eps=0.2, alpha=0.05, eot_iter=2)
        >>> bool((adv - images).abs().max() <= 0.2)
        True
    """
    check_flags(random_start=random_start, targeted=targeted)
    check_generator(generator)
    ball, size = ball_around(images, eps, norm, lo, hi), step_sizes(images, alpha)
    check_count("steps", steps, least=0)
    check_count("eot_iter", eot_iter, least=1)
    loss_function(loss)

    def search(model: Queries, images: Tensor, labels: Tensor) -> Tensor:
        raised = loss_to_raise(loss, labels, targeted)
        adv = movement.start(images, ball, as_philox_state(generator)) if random_start else images
        for _ in range(steps):
            gradient = torch.stack([model.gradient(adv, raised) for _ in range(eot_iter)]).mean(0)
            adv = movement.step(adv, gradient, images, size, ball)
        return into_ball(adv, images, ball)

    return run_search(search, model, images, labels, lo, hi, check, engine)


class EOTPGD(HostAttack):
    """`attacks.eotpgd` bound to a model, with the interface of torchattacks.EOTPGD.

    Args:
        model, eps, alpha, steps, eot_iter, random_start, norm, loss, targeted, options: as in `attacks.eotpgd`.

    Raises:
        TypeError, ValueError: when called, as `attacks.eotpgd`.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> attack = attacks.EOTPGD(models.build("digits_cnn", width=8), eps=0.2, steps=3)
        >>> attack(torch.rand(2, 1, 8, 8), torch.tensor([0, 1])).shape
        torch.Size([2, 1, 8, 8])
    """

    _function = staticmethod(eotpgd)

    def __init__(
        self,
        model: Model,
        eps: float | Tensor = 8 / 255,
        alpha: float | Tensor = 2 / 255,
        steps: int = 10,
        eot_iter: int = 2,
        random_start: bool = True,
        *,
        norm: str = "linf",
        loss: str | Loss = "ce",
        targeted: bool = False,
        **options: Unpack[BasicOptions],
    ) -> None:
        super().__init__(model, **options)
        self.eps, self.alpha, self.steps, self.eot_iter = eps, alpha, steps, eot_iter
        self.random_start, self.norm, self.loss, self.targeted = random_start, norm, loss, targeted
