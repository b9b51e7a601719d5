"""Chooses the classes that a targeted attack is to reach, from the true classes and the logits of the clean images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparse_adv.attacks.checks import check_classes, check_labels

TargetFunction = Callable[[Tensor, Tensor], Tensor]
"""target_function(images, labels) -> the classes to reach, an integer tensor [N]."""

Logits = Callable[[Tensor], Tensor]
"""logits(images) -> [N, classes]."""

Targets = Callable[[Logits, Tensor, Tensor], Tensor]
"""targets(logits, images, labels) -> the classes to reach; `logits` belongs to the attacked model."""


def given_targets(function: TargetFunction, logits: Logits, images: Tensor, labels: Tensor) -> Tensor:
    """The classes that the caller's function gives."""
    return function(images, labels)


def random_targets(logits: Logits, images: Tensor, labels: Tensor) -> Tensor:
    """One of the other classes for each image, drawn by PyTorch's global generator."""
    classes = _checked_logits(logits, images, labels).shape[1]
    return (labels + torch.randint(1, classes, labels.shape, device="cpu").to(labels.device)) % classes


def least_likely(kth_min: int, logits: Logits, images: Tensor, labels: Tensor) -> Tensor:
    """The wrong class with the kth lowest logit of each image."""
    of_images = _checked_logits(logits, images, labels)
    if kth_min >= of_images.shape[1]:
        raise ValueError(f"kth_min must be less than the number of classes, {of_images.shape[1]}, got {kth_min}")
    return of_images.scatter(1, labels[:, None], torch.inf).argsort(1)[:, kth_min - 1]


def _checked_logits(logits: Logits, images: Tensor, labels: Tensor) -> Tensor:
    """The logits of images; ValueError unless their labels are classes of the model and it has other classes too."""
    check_labels(images, labels)
    of_images = logits(images)
    classes = of_images.shape[1]
    if classes < 2:
        raise ValueError(f"a targeted attack needs a model of at least 2 classes, got {classes}")
    check_classes(labels, classes)
    return of_images
