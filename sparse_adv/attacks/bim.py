"""BIM, the basic iterative method: PGD that starts at the clean image."""

from __future__ import annotations

import math
from typing import Unpack

from torch import Tensor

from sparse_adv.argument_types import check_count
from sparse_adv.attacks.as_module import Model
from sparse_adv.attacks.ball import checked_ball
from sparse_adv.attacks.options import LossOptions, check_names
from sparse_adv.attacks.pgd import PGD, pgd


def bim(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor = 8 / 255,
    alpha: float | Tensor = 2 / 255,
    steps: int = 10,
    norm: str = "linf",
    **options: Unpack[LossOptions],
) -> Tensor:
    """Basic iterative method: adv = project(adv + alpha * direction(gradient)) from the clean image, see `pgd`.

    Args:
        model, images, labels, eps, alpha, steps, norm, options: as in `pgd`; options are loss, targeted, lo, hi,
            generator, bn_mode, check, graphs, engine and early_stop.

    Returns:
        The adversarial images, detached, as in `pgd`.

    Raises:
        TypeError, ValueError: as in `pgd`.

    Source: Kurakin et al., "Adversarial examples in the physical world" (ICLR 2017 workshop), section 2.2.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> model = models.build("digits_cnn", width=8)
        >>> images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
        >>> adv = attacks.bim(model, images, labels, eps=0.2, alpha=0.05)
        >>> bool((adv - images).abs().max() <= 0.2 + 1e-6)
        True
    """
    check_names("bim", options, LossOptions)
    return pgd(model, images, labels, eps=eps, alpha=alpha, steps=steps, norm=norm, random_start=False, **options)


class BIM(PGD):
    """`attacks.bim` bound to a model, with the interface of torchattacks.BIM.

    Args:
        model, eps, alpha, norm, options: as in `attacks.bim`.
        steps: number of steps; 0 for the paper's number, the integer part of min(255 eps + 4, 1.25 * 255 eps), if eps
            is a number.
        graph: on CUDA, capture the attack as CUDA graphs, see `Graphs`.

    Raises:
        ValueError: if an option is out of range, or steps is 0 and eps a tensor or infinite.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> attacks.BIM(models.build("digits_cnn", width=8), eps=8 / 255, alpha=1 / 255, steps=0).options.steps
        10
    """

    def __init__(
        self,
        model: Model,
        eps: float | Tensor = 8 / 255,
        alpha: float | Tensor = 2 / 255,
        steps: int = 10,
        *,
        norm: str = "linf",
        graph: bool = False,
        **options: Unpack[LossOptions],
    ) -> None:
        check_names(type(self).__name__, options, LossOptions)
        check_count("steps", steps, least=0)
        if steps == 0:
            checked_ball(eps, norm, 0.0, 1.0)
            if isinstance(eps, Tensor) or eps == math.inf:
                what = "a tensor" if isinstance(eps, Tensor) else "infinite"
                raise ValueError(f"steps must be at least 1 where eps is {what}, got 0 for the paper's number")
            steps = int(min(255 * eps + 4, 1.25 * 255 * eps))
        super().__init__(model, eps, alpha, steps, random_start=False, norm=norm, graph=graph, **options)
