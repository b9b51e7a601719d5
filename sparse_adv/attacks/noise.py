"""Baselines for attacks: unchanged images, and Gaussian noise."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor

from sparse_adv.attacks.as_module import Model
from sparse_adv.attacks.ball import ball_around
from sparse_adv.attacks.base import Attack
from sparse_adv.attacks.host_attack import HostAttack
from sparse_adv.attacks.options import BasicOptions
from sparse_adv.ops.arguments import check_number


class VANILA(Attack):
    """No attack: the unchanged images, with the interface of torchattacks.VANILA.

    Args:
        model: as in `Attack`.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> images = torch.rand(2, 1, 8, 8)
        >>> torch.equal(attacks.VANILA(models.build("digits_cnn", width=8))(images), images)
        True
    """

    supports_targets = False
    needs_labels = False

    def __init__(self, model: Model) -> None:
        super().__init__(model)

    def forward(self, model: Model, images: Tensor, labels: Any, targeted: bool) -> Tensor:
        """Return the images of a batch, detached."""
        return images.detach().clone()


class GN(HostAttack):
    """Gaussian noise of standard deviation std, clamped to the range of pixels, as torchattacks.GN adds it.

    Args:
        model: as in `Attack`.
        std: standard deviation, in units of the images; at least 0. PyTorch's global generator draws the noise.
        options: lo, hi, check and engine, as in `attacks.pgd`; only lo and hi have an effect.

    Raises:
        ValueError: if std is negative or not finite.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> attacks.GN(models.build("digits_cnn", width=8), std=0.1)(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 1, 8, 8])
    """

    supports_targets = False
    needs_labels = False

    def __init__(self, model: Model, std: float = 0.1, **options: Unpack[BasicOptions]) -> None:
        super().__init__(model, **options)
        check_number("std", std)
        if not 0 <= std < float("inf"):
            raise ValueError(f"std must be at least 0 and finite, got {std}")
        self.std = std

    def forward(self, model: Model, images: Tensor, labels: Any, targeted: bool) -> Tensor:
        """Return noisy images of a batch."""
        ball = ball_around(images, float("inf"), "linf", self.lo, self.hi)
        noise = torch.randn_like(images) * self.std
        return ball.clamp(images.detach() + noise)
