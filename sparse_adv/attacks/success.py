"""When an image counts as adversarial.

What attacks and evaluations report goes by the class. Searches go by the margin, which also says by how much. The two
differ only if the two largest logits are equal: then the margin is 0, and the search goes on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_adv.attacks.losses import margin


def is_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether each image is classified as its label, bool [N]; false for an image with a NaN among its logits."""
    return (logits.argmax(1) == labels) & ~logits.isnan().any(1)


def is_adversarial(logits: Tensor, labels: Tensor, targeted: bool) -> Tensor:
    """Whether each image is misclassified, or has the class of its label if that is a target; bool [N]."""
    correct = is_correct(logits, labels)
    return correct if targeted else ~correct


def advantage(logits: Tensor, labels: Tensor, targeted: bool) -> Tensor:
    """The margin by which each image is adversarial, [N]: positive if it is misclassified or at its target.

    An image with a NaN among its logits has no class: its margin is infinity, or minus infinity if it has a target.
    """
    gain = -margin(logits, labels) if targeted else margin(logits, labels)
    return gain.masked_fill(logits.isnan().any(1), -torch.inf if targeted else torch.inf)


def robust_images(logits: Tensor, labels: Tensor, targeted: bool) -> Tensor:
    """The indices of the images that are not adversarial."""
    return (~(advantage(logits, labels, targeted) > 0)).nonzero().squeeze(1)
