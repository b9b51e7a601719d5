"""The single-step attacks of fast adversarial training: FGSM, FGSM-RS and N-FGSM."""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor

from sparse_adv.attacks.as_module import Model
from sparse_adv.attacks.gradient_attack import GradientAttack
from sparse_adv.attacks.options import AttackOptions, LossOptions, check_names
from sparse_adv.attacks.run_attack import run_attack


def fgsm(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor = 8 / 255,
    norm: str = "linf",
    **options: Unpack[LossOptions],
) -> Tensor:
    """Fast gradient (sign) method: one step of size eps from the clean images.

    Args:
        model, images, labels, eps, norm, options: as in `pgd`; options are loss, targeted, lo, hi, generator, bn_mode,
            check, graphs, engine and early_stop.

    Returns:
        The adversarial images, detached, as in `pgd`.

    Raises:
        TypeError, ValueError: as in `pgd`.

    Source: Goodfellow et al., "Explaining and harnessing adversarial examples" (ICLR 2015), section 4.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> model = models.build("digits_cnn", width=8)
        >>> images, labels = torch.full((2, 1, 8, 8), 0.5), torch.tensor([0, 1])
        >>> adv = attacks.fgsm(model, images, labels, eps=0.25)
        >>> (adv - images).unique()  # -eps, +eps
        tensor([-0.2500,  0.2500])
    """
    return run_attack(model, images, labels, AttackOptions.fgsm(eps, norm, **options))


def fgsm_rs(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor = 8 / 255,
    alpha: float | Tensor | None = None,
    norm: str = "linf",
    **options: Unpack[LossOptions],
) -> Tensor:
    """FGSM with a random start: one step of size alpha from a random point of the ball, then projection.

    Args:
        alpha: step size; None for 1.25 eps.
        model, images, labels, eps, norm, options: as in `pgd`; options are loss, targeted, lo, hi, generator, bn_mode,
            check, graphs, engine and early_stop.

    Returns:
        The adversarial images, detached, as in `pgd`.

    Raises:
        TypeError, ValueError: as in `pgd`.

    Source: Wong et al., "Fast is better than free" (ICLR 2020), algorithm 3.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> model = models.build("digits_cnn", width=8)
        >>> images, labels = torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
        >>> adv = attacks.fgsm_rs(model, images, labels, eps=0.1)
        >>> bool((adv - images).abs().max() <= 0.1 + 1e-6)
        True
    """
    return run_attack(model, images, labels, AttackOptions.fgsm_rs(eps, alpha, norm, **options))


def n_fgsm(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor = 8 / 255,
    alpha: float | Tensor | None = None,
    norm: str = "linf",
    **options: Unpack[LossOptions],
) -> Tensor:
    """N-FGSM: noise from U(-2 eps, 2 eps), then one signed step of size alpha, without projection.

    The result is clamped to [lo, hi] but may be 2 eps + alpha away from the clean image: use it for training, not for
    measuring robustness. The paper has linf only; for l2 the noise is uniform in the ball of radius 2 eps.

    Args:
        alpha: step size; None for eps.
        model, images, labels, eps, norm, options: as in `pgd`; options are loss, targeted, lo, hi, generator, bn_mode,
            check, graphs, engine and early_stop.

    Returns:
        The adversarial images, detached, as in `pgd`.

    Raises:
        TypeError, ValueError: as in `pgd`.

    Source: de Jorge et al., "Make some noise" (NeurIPS 2022), algorithm 1.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> model = models.build("digits_cnn", width=8)
        >>> images, labels = torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
        >>> adv = attacks.n_fgsm(model, images, labels, eps=0.1)
        >>> bool((adv - images).abs().max() <= 0.3 + 1e-6)  # 2 eps + alpha
        True
    """
    return run_attack(model, images, labels, AttackOptions.n_fgsm(eps, alpha, norm, **options))


class FGSM(GradientAttack):
    """`attacks.fgsm` bound to a model, with the interface of torchattacks.FGSM.

    Args:
        model, eps, norm, options: as in `attacks.fgsm`.
        graph: on CUDA, capture the attack as CUDA graphs, see `Graphs`.

    Raises:
        ValueError: if an option is out of range.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> attack = attacks.FGSM(models.build("digits_cnn", width=8), eps=0.25)
        >>> attack(torch.rand(2, 1, 8, 8), torch.tensor([0, 1])).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        model: Model,
        eps: float | Tensor = 8 / 255,
        *,
        norm: str = "linf",
        graph: bool = False,
        **options: Unpack[LossOptions],
    ) -> None:
        check_names(type(self).__name__, options, LossOptions)
        super().__init__(model, AttackOptions.fgsm(eps, norm, **options), graph)

    def _with(self, **changes: Any) -> AttackOptions:
        if "eps" in changes:
            changes["alpha"] = changes["eps"]
        return super()._with(**changes)


class FFGSM(GradientAttack):
    """`attacks.fgsm_rs` bound to a model, with the interface of torchattacks.FFGSM.

    Args:
        model, eps, norm, options: as in `attacks.fgsm_rs`.
        alpha: step size; None for 1.25 eps. It does not change when eps is set anew.
        graph: on CUDA, capture the attack as CUDA graphs, see `Graphs`.

    Raises:
        ValueError: if an option is out of range.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> attack = attacks.FFGSM(models.build("digits_cnn", width=8), eps=0.25, alpha=0.3)
        >>> attack(torch.rand(2, 1, 8, 8), torch.tensor([0, 1])).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        model: Model,
        eps: float | Tensor = 8 / 255,
        alpha: float | Tensor | None = 10 / 255,
        *,
        norm: str = "linf",
        graph: bool = False,
        **options: Unpack[LossOptions],
    ) -> None:
        check_names(type(self).__name__, options, LossOptions)
        super().__init__(model, AttackOptions.fgsm_rs(eps, alpha, norm, **options), graph)
