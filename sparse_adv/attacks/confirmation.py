"""Confirms the examples that a search found, with the model itself."""

from __future__ import annotations

from torch import Tensor

from sparse_adv.attacks.ball import Ball, into_ball
from sparse_adv.attacks.queries import Queries
from sparse_adv.attacks.success import advantage

_PUSHES = (0.0, 1e-4, 1e-3, 1e-2)
"""By which shares a perturbation is made longer, in turn."""


def confirmed(model: Queries, found: Tensor, images: Tensor, labels: Tensor, ball: Ball, targeted: bool) -> Tensor:
    """The found examples if the model itself, without the engine, misclassifies them; else the clean images.

    A search for the least distance ends so near to the boundary that rounding decides the class, and the engine, or
    another batch size, rounds differently. So the perturbation is made up to 1 % longer, by the factors in `_PUSHES` in
    turn, until the margin exceeds rounding. If it never does, the last misclassified example counts. In a dtype of few
    bits that is often the example as it was found.

    Args:
        model: the model under attack.
        found: float tensor [N, ...], the examples that the search found, or the clean image if it found none.
        images: float tensor [N, ...], the clean images.
        labels: int64 tensor [N].
        ball: the images that may be returned, `on` these images.
        targeted: whether an image is adversarial if it is classified as its label.

    Returns:
        A tensor with shape and dtype of `images`.
    """
    result, left = images.clone(), (found != images).flatten(1).any(1).nonzero().squeeze(1)
    for share in _PUSHES:
        if not len(left):
            break
        clean, x = images[left], found[left]
        x = into_ball(clean + (1 + share) * (x - clean) if share else x, clean, ball.of(left))
        logits, rounding = model.own_logits(x)
        margins = advantage(logits, labels[left], targeted)
        result[left[margins > 0]] = x[margins > 0]
        left = left[~(margins > rounding)]
    return result
