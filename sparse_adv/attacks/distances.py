"""The distances of adversarial examples."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_adv.attacks.as_module import Model, as_module
from sparse_adv.attacks.ball import checked_ball
from sparse_adv.attacks.checks import (
    check_classes,
    check_images,
    check_labels,
    count_classes,
    int64_labels,
)
from sparse_adv.attacks.geometry import distance
from sparse_adv.attacks.modes import in_mode
from sparse_adv.attacks.success import is_adversarial
from sparse_adv.ops.arguments import check_flag, check_floating


@torch.no_grad()
def distances(
    model: Model, adversarial: Tensor, images: Tensor, labels: Tensor, *, norm: str = "linf", targeted: bool = False
) -> Tensor:
    """The distance of each image's adversarial example: 0 if the clean image is misclassified, infinity if there is
    none.

    Args:
        model: maps images to logits [N, classes]; evaluated in eval mode and left as it was.
        adversarial: float tensor [N, ...], from `fmn`, `fab`, `cw` or another attack.
        images: float tensor [N, ...], the clean images.
        labels: integer tensor [N]: the true classes, or the classes to reach if targeted.
        norm: "linf" or "l2", also written "Linf" or "L2".
        targeted: an image is adversarial if it is classified as `labels`.

    Returns:
        float tensor [N], in units of the images; the share of distances above eps is the robust accuracy at eps.

    Raises:
        TypeError: if model cannot be called, images are not floating point or labels not integers.
        ValueError: if norm is not "linf" or "l2", a shape is wrong, or a label is no class of the model.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks
        >>> images, labels = torch.tensor([[1.0, 0.5], [0.0, 0.5], [1.0, 0.5]]), torch.zeros(3, dtype=torch.int64)
        >>> adversarial = torch.tensor([[0.25, 0.5], [0.0, 0.5], [1.0, 0.5]])
        >>> attacks.distances(lambda x: x, adversarial, images, labels)
        tensor([0.7500, 0.0000,    inf])
    """
    norm = checked_ball(0.0, norm, 0.0, 1.0).norm
    check_flag("targeted", targeted)
    module, _ = as_module(model)
    labels = int64_labels(labels)
    check_images(images)
    check_labels(images, labels)
    check_floating("adversarial", adversarial)
    if adversarial.shape != images.shape:
        raise ValueError(
            f"adversarial must have the shape of images, {list(images.shape)}, got {list(adversarial.shape)}"
        )
    with in_mode(module, "eval") as model:
        logits = [model(x) for x in (images, adversarial)]
    for each in logits:
        check_classes(labels, count_classes(each, len(images)))
    before, after = (is_adversarial(each, labels, targeted) for each in logits)
    found = distance(adversarial, images, norm).where(after, math.inf)
    return found.where(~before, 0)
