"""The attack of TRADES: PGD that maximises a divergence, without labels."""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor

from sparse_adv.attacks.as_module import Model
from sparse_adv.attacks.gradient_attack import GradientAttack
from sparse_adv.attacks.options import AttackOptions, CommonOptions, check_names, tpgd_start
from sparse_adv.attacks.run_attack import run_attack


def tpgd(
    model: Model,
    images: Tensor,
    *,
    eps: float | Tensor = 8 / 255,
    alpha: float | Tensor = 2 / 255,
    steps: int = 10,
    norm: str = "linf",
    **options: Unpack[CommonOptions],
) -> Tensor:
    """The attack of TRADES: PGD that maximises KL(p(images) || p(adv)), without labels.

    It starts from uniform noise, because the divergence has no gradient at the clean images: in [-0.001, 0.001], or for
    l2 in the ball of radius 0.05 (the length of noise of 0.001 on a CIFAR image). Their probabilities p(images) are
    computed once.

    Args:
        model, images, eps, alpha, steps, norm, options: as in `pgd`; options are lo, hi, generator, bn_mode, check,
            graphs and engine.

    Returns:
        The adversarial images, detached, as in `pgd`.

    Raises:
        TypeError, ValueError: as in `pgd`.

    Source: Zhang et al., "Theoretically principled trade-off between robustness and accuracy" (ICML 2019), algorithm 1;
    the noise there is normal with standard deviation 0.001.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> model = models.build("digits_cnn", width=8)
        >>> images = torch.rand(2, 1, 8, 8)
        >>> adv = attacks.tpgd(model, images, eps=0.1, alpha=0.025)
        >>> bool((adv - images).abs().max() <= 0.1 + 1e-6)
        True
    """
    return run_attack(model, images, None, AttackOptions.tpgd(eps, alpha, steps, norm, **options))


class TPGD(GradientAttack):
    """`attacks.tpgd` bound to a model, with the interface of torchattacks.TPGD; labels are accepted and not used.

    Args:
        model, eps, alpha, steps, norm, options: as in `attacks.tpgd`.
        graph: on CUDA, capture the attack as CUDA graphs, see `Graphs`.

    Raises:
        ValueError: if an option is out of range.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> attack = attacks.TPGD(models.build("digits_cnn", width=8), eps=0.25, alpha=0.125, steps=4)
        >>> attack(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 1, 8, 8])
    """

    supports_targets = False
    needs_labels = False

    def __init__(
        self,
        model: Model,
        eps: float | Tensor = 8 / 255,
        alpha: float | Tensor = 2 / 255,
        steps: int = 10,
        *,
        norm: str = "linf",
        graph: bool = False,
        **options: Unpack[CommonOptions],
    ) -> None:
        check_names(type(self).__name__, options, CommonOptions)
        super().__init__(model, AttackOptions.tpgd(eps, alpha, steps, norm, **options), graph)

    def _with(self, **changes: Any) -> AttackOptions:
        eps, norm = (changes.get(name, getattr(self.options, name)) for name in ("eps", "norm"))
        return super()._with(start_eps=tpgd_start(eps, norm), **changes)

    def forward(self, model: Model, images: Tensor, labels: Tensor | None, targeted: bool) -> Tensor:
        """Return adversarial images for a batch; the labels are not used."""
        return run_attack(model, images, None, self.options)
