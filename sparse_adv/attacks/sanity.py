"""Signs that a robust accuracy is not to be trusted, because gradients tell the attacks too little."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_adv.attacks.checks import Model, as_module, count_classes
from sparse_adv.attacks.loop import bn_mode
from sparse_adv.engine import Autograd

_TOO_MANY = 0.1
"""If the gradient is zero at more than this fraction of the images, a warning is given."""


def signs_of_masking(model: Model, images: Tensor, labels: Tensor) -> list[str]:
    """Look for outputs and gradients on which gradient attacks, and AutoAttack, are known to fail.

    Looked for are logits that differ between two equal calls, outputs that are probabilities (rows in [0, 1] that sum
    to 1), outputs that are NaN, and images at which the gradient of the cross-entropy is zero.

    Args:
        model: maps images to logits [N, classes]; a module or a plain function.
        images: float tensor [N, ...], N at least 1.
        labels: int64 tensor [N].

    Returns:
        One sentence for each sign; none does not prove that there is no masking.

    Raises:
        TypeError, ValueError: if the model's output is not logits [N, classes].

    Source: Croce and Hein (ICML 2020), section 5; Carlini et al., "On evaluating adversarial robustness" (2019),
    section 3; Athalye et al., "Obfuscated gradients give a false sense of security" (ICML 2018), section 3.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> net = models.build("digits_cnn", width=8)
        >>> images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
        >>> attacks.signs_of_masking(net, images, labels)
        []
        >>> attacks.signs_of_masking(lambda x: net(x).softmax(1), images, labels)
        ['the outputs are probabilities and not logits: attacks need the values before the softmax']
    """
    module, _ = as_module(model)
    found = []
    with torch.inference_mode(False), bn_mode(module, "eval"):
        reference = Autograd(module)
        images, labels = images.detach().clone(), labels.detach().clone()
        logits, again = reference.logits(images), reference.logits(images)
        count_classes(logits, len(images))
        missing = logits.isnan().any(1)
        if missing.any():
            found.append(f"the outputs of {int(missing.sum())} of {len(images)} images are NaN: they count as wrong")
        if not torch.equal(logits.nan_to_num(), again.nan_to_num()):
            found.append(
                'the outputs differ between two calls: average gradients (eot_iter, AutoAttack\'s version "rand")'
            )
        in_range = bool(((logits >= 0) & (logits <= 1)).all())
        if in_range and bool(((logits.sum(1) - 1).abs() < 1e-3).all()):
            found.append("the outputs are probabilities and not logits: attacks need the values before the softmax")
        gradient = reference.gradient(images, lambda logits: F.cross_entropy(logits, labels, reduction="none"))
        zero = int((gradient.flatten(1).nan_to_num() == 0).all(1).sum())
        if zero > _TOO_MANY * len(images):
            found.append(f"the gradient is zero at {zero} of {len(images)} images: gradient attacks cannot move them")
    return found
