"""Several attacks one after the other, each on the images that the earlier ones left robust."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_adv.argument_types import checks_types, shortened
from sparse_adv.attacks.as_module import Model
from sparse_adv.attacks.base import Attack
from sparse_adv.attacks.checks import check_classes, check_labels, int64_labels
from sparse_adv.attacks.success import is_correct


class MultiAttack(Attack):
    """Several attack objects, with the interface of torchattacks.MultiAttack: each attacks the images still robust.

    An image is adversarial if it is not classified as its label; later attacks leave it out. Images are returned clean
    if no attack finds an adversarial example, or if they are misclassified without an attack.

    Args:
        attacks: at least two attack objects of one model, with the same normalisation of images if any. They may be
            in a targeted mode in which labels are the true classes: labels say which images are adversarial.
        verbose: print for each batch the percentage of its images that are adversarial after each attack.

    Raises:
        ValueError: if there are fewer than two attacks, they have different models or normalisations, or labels are
            targets for one of them; also when called.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> model = models.build("digits_cnn", width=8)
        >>> attack = attacks.MultiAttack([attacks.PGD(model, eps=0.1), attacks.Square(model, eps=0.1, n_queries=10)])
        >>> attack(torch.rand(2, 1, 8, 8), torch.tensor([0, 1])).shape
        torch.Size([2, 1, 8, 8])
    """

    supports_targets = False

    @checks_types
    def __init__(self, attacks: Sequence[Attack], verbose: bool = False) -> None:
        _check_members(attacks)
        super().__init__(attacks[0].model)
        self.attacks, self.verbose = list(attacks), verbose
        self._robust_counts = [0] * (len(attacks) + 1)
        """Sums over batches: number of images, and of images still robust after each attack."""

    def set_normalization_used(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Take and return normalised images from now on, in each of the attacks."""
        for attack in self.attacks:
            attack.set_normalization_used(mean, std)

    def set_device(self, device: torch.device | str) -> None:
        """Images and labels go to this device from now on, in each of the attacks."""
        super().set_device(device)
        for attack in self.attacks:
            attack.set_device(device)

    def set_model(self, model: Model) -> None:
        """Attack another model from now on, in each of the attacks."""
        super().set_model(model)
        for attack in self.attacks:
            attack.set_model(model)

    @checks_types
    def set_model_training_mode(
        self, model_training: bool = False, batchnorm_training: bool = False, dropout_training: bool = False
    ) -> None:
        """Attack the model in training mode, in each of the attacks, see `Attack.set_model_training_mode`."""
        for attack in self.attacks:
            attack.set_model_training_mode(model_training, batchnorm_training, dropout_training)

    def for_images(self, index: Tensor) -> Attack:
        """These attacks for some images of a batch, see `Attack.for_images`."""
        attack = copy.copy(self)
        attack.attacks = [member.for_images(index) for member in self.attacks]
        return attack

    @property
    def normalization_used(self) -> dict[str, Tensor] | None:
        """Mean and std of the images that the attacks take; None for pixels."""
        return self.attacks[0].normalization_used

    def normalize(self, images: Tensor) -> Tensor:
        return self.attacks[0].normalize(images)

    def inverse_normalize(self, images: Tensor) -> Tensor:
        return self.attacks[0].inverse_normalize(images)

    @torch.no_grad()
    def forward(self, model: Model, images: Tensor, labels: Tensor, targeted: bool) -> Tensor:
        """Return adversarial images for a batch."""
        _check_members(self.attacks)  # again: their settings may have changed
        best, labels = images.clone(), int64_labels(labels)
        check_labels(images, labels)
        left = torch.arange(len(images), device=images.device)
        if len(images):
            logits = self.get_logits(images)
            check_classes(labels, logits.shape[1])
            left = left[is_correct(logits, labels)]
        counts = [len(images)]
        for attack in self.attacks:
            if not len(left):
                counts.append(0)
                continue
            adv = attack.for_images(left)(images[left], labels[left])
            broken = ~is_correct(self.get_logits(adv), labels[left])
            best[left[broken]] = adv[broken]
            left = left[~broken]
            counts.append(len(left))
        if self.verbose and len(images):
            print("adversarial after each attack: " + ", ".join(f"{rate:.2f} %" for rate in _rates(counts)))
        self._robust_counts = [sum(pair) for pair in zip(self._robust_counts, counts, strict=True)]
        return best

    @checks_types
    def save(
        self,
        data_loader: Iterable[tuple[Tensor, Tensor]],
        save_path: str | Path | None = None,
        verbose: bool = True,
        return_verbose: bool = False,
        save_predictions: bool = False,
        save_clean_inputs: bool = False,
        save_type: str = "float",
    ) -> Any:
        """As `Attack.save`; with return_verbose, a list of percent adversarial after each attack comes second."""
        attack = copy.copy(self)
        attack._robust_counts = [0] * (len(self.attacks) + 1)
        options = save_path, verbose, True, save_predictions, save_clean_inputs, save_type
        accuracy, *rest = super(MultiAttack, attack).save(data_loader, *options)
        return (accuracy, _rates(attack._robust_counts), *rest) if return_verbose else None


def _check_members(attacks: Sequence[Attack]) -> None:
    """Raise TypeError or ValueError unless these attacks take the same images and labels, and share their model."""
    if len(attacks) < 2:
        raise ValueError(f"attacks must be at least two, got {len(attacks)}")
    for index, attack in enumerate(attacks):
        if not isinstance(attack, Attack):
            raise TypeError(f"attacks must be attack objects, got {shortened(attack)}")
        if attack.labels_are_targets:
            raise ValueError(
                f"labels must be true classes for all attacks, they are targets for attacks[{index}], {attack.attack}"
            )
    first, *others = attacks
    if any(attack.model is not first.model for attack in others):
        raise ValueError("attacks must all have the same model, got different ones")
    if not all(_normalised_alike(attack.normalization_used, first.normalization_used) for attack in others):
        raise ValueError("attacks must all have the same normalisation, got different ones")


def _normalised_alike(used: dict[str, Tensor] | None, other: dict[str, Tensor] | None) -> bool:
    """Whether mean and std of two attacks are the same; one value counts for every channel."""
    if used is None or other is None:
        return used is other
    pairs = [(used[name].flatten(), other[name].flatten()) for name in ("mean", "std")]
    fits = all(len(a) == len(b) or 1 in (len(a), len(b)) for a, b in pairs)
    return fits and all(bool((a.cpu() == b.cpu()).all()) for a, b in pairs)


def _rates(counts: Sequence[int]) -> list[float]:
    return [100 * (1 - count / counts[0]) for count in counts[1:]]
