"""Several attacks one after the other, each on the images that are still robust after the ones before."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_adv.attacks.base import Attack
from sparse_adv.attacks.checks import Model, int64_labels, is_correct


class MultiAttack(Attack):
    """Attack objects in a row, with the interface of torchattacks.MultiAttack: each attacks what is still robust.

    An image is adversarial when it is not classified as its label; later attacks leave it out. Images for which no
    attack finds an adversarial example, and those that are misclassified without one, come back clean.

    Args:
        attacks: at least two attack objects of one model.
        verbose: accepted, and without effect.

    Raises:
        ValueError: if there are fewer than two attacks, or they have different models.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> model = models.build("digits_cnn", width=8)
        >>> attack = attacks.MultiAttack([attacks.PGD(model, eps=0.1), attacks.Square(model, eps=0.1, n_queries=10)])
        >>> attack(torch.rand(2, 1, 8, 8), torch.tensor([0, 1])).shape
        torch.Size([2, 1, 8, 8])
    """

    supports_targets = False

    def __init__(self, attacks: Sequence[Attack], verbose: bool = False) -> None:
        if len(attacks) < 2:
            raise ValueError(f"attacks must be at least two, got {len(attacks)}")
        if any(attack.model is not attacks[0].model for attack in attacks):
            raise ValueError("attacks must all have the same model, got different ones")
        super().__init__(attacks[0].model)
        self.attacks = list(attacks)

    def set_normalization_used(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Take and return normalised images from now on, in each of the attacks."""
        for attack in self.attacks:
            attack.set_normalization_used(mean, std)

    def for_images(self, index: Tensor) -> Attack:
        """These attacks for some images of a batch, see `Attack.for_images`."""
        attack = copy.copy(self)
        attack.attacks = [member.for_images(index) for member in self.attacks]
        return attack

    def _pixels(self, images: Tensor) -> Tensor:
        return self.attacks[0]._pixels(images)

    @torch.no_grad()
    def forward(self, model: Model, images: Tensor, labels: Tensor, targeted: bool) -> Tensor:
        """Return adversarial images for a batch."""
        best, labels = images.clone(), int64_labels(labels)
        standing = torch.arange(len(images), device=images.device)
        if len(images):
            standing = standing[is_correct(self._logits(images), labels)]
        for attack in self.attacks:
            if not len(standing):
                break
            adv = attack.for_images(standing)(images[standing], labels[standing])
            broken = ~is_correct(self._logits(adv), labels[standing])
            best[standing[broken]] = adv[broken]
            standing = standing[~broken]
        return best
