"""APGD as objects: `attacks.apgd` and `attacks.apgd_t` bound to a model."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from sparse_adv.attacks.apgd import apgd, apgd_t
from sparse_adv.attacks.base import HostAttack
from sparse_adv.attacks.checks import Model
from sparse_adv.attacks.generators import seeded
from sparse_adv.attacks.losses import Loss
from sparse_adv.attacks.options import BasicOptions, check_count


class APGD(HostAttack):
    """`attacks.apgd` bound to a model, with the interface of torchattacks.APGD.

    Args:
        model, norm, eps, steps, loss, eot_iter, rho: as in `attacks.apgd`.
        n_restarts: number of random starts.
        seed: of the random starts; each call draws the same ones.
        verbose: accepted, and without effect.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> attack = attacks.APGD(models.build("digits_cnn", width=8), eps=0.1, steps=5, loss="dlr")
        >>> attack(torch.rand(2, 1, 8, 8), torch.tensor([0, 1])).shape
        torch.Size([2, 1, 8, 8])
    """

    verbose = False
    """Accepted, and without effect."""

    def __init__(
        self,
        model: Model,
        norm: str = "Linf",
        eps: float | Tensor = 8 / 255,
        steps: int = 10,
        n_restarts: int = 1,
        seed: int = 0,
        loss: str | Loss = "ce",
        eot_iter: int = 1,
        rho: float = 0.75,
        verbose: bool = False,
        **options: Unpack[BasicOptions],
    ) -> None:
        super().__init__(model, **options)
        self.norm, self.eps, self.steps, self.n_restarts, self.seed = norm, eps, steps, n_restarts, seed
        self.loss, self.eot_iter, self.rho = loss, eot_iter, rho

    def forward(self, model: Model, images: Tensor, labels: Tensor, targeted: bool) -> Tensor:
        """Return adversarial images for a batch."""
        return apgd(
            model,
            images,
            labels,
            norm=self.norm,
            eps=self.eps,
            steps=self.steps,
            restarts=self.n_restarts,
            loss=self.loss,
            targeted=targeted,
            eot_iter=self.eot_iter,
            rho=self.rho,
            generator=seeded(self.seed),
            **self._options,
        )


class APGDT(HostAttack):
    """`attacks.apgd_t` bound to a model, with the interface of torchattacks.APGDT.

    Args:
        model, norm, eps, steps, eot_iter, rho: as in `attacks.apgd`.
        n_restarts, seed, verbose: as in `APGD`.
        n_classes: number of classes; all wrong ones are targets.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> attack = attacks.APGDT(models.build("digits_cnn", width=8), eps=0.1, steps=5)
        >>> attack(torch.rand(2, 1, 8, 8), torch.tensor([0, 1])).shape
        torch.Size([2, 1, 8, 8])
    """

    supports_targets = False
    verbose = False
    """Accepted, and without effect."""

    def __init__(
        self,
        model: Model,
        norm: str = "Linf",
        eps: float | Tensor = 8 / 255,
        steps: int = 10,
        n_restarts: int = 1,
        seed: int = 0,
        eot_iter: int = 1,
        rho: float = 0.75,
        verbose: bool = False,
        n_classes: int = 10,
        **options: Unpack[BasicOptions],
    ) -> None:
        super().__init__(model, **options)
        check_count("n_classes", n_classes, least=2)
        self.norm, self.eps, self.steps, self.n_restarts, self.seed = norm, eps, steps, n_restarts, seed
        self.eot_iter, self.rho, self.n_classes = eot_iter, rho, n_classes

    def forward(self, model: Model, images: Tensor, labels: Tensor, targeted: bool) -> Tensor:
        """Return adversarial images for a batch."""
        return apgd_t(
            model,
            images,
            labels,
            norm=self.norm,
            eps=self.eps,
            steps=self.steps,
            restarts=self.n_restarts,
            n_target_classes=self.n_classes - 1,
            eot_iter=self.eot_iter,
            rho=self.rho,
            generator=seeded(self.seed),
            **self._options,
        )
