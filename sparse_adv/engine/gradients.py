"""The gradient of a function of the images, or a clear error where there is none."""

from __future__ import annotations

import torch
from torch import Tensor


class NoGradientError(ValueError):
    """A function of the images through which no gradient leads back to them."""


def image_gradient(value: Tensor, x: Tensor, retain_graph: bool = False) -> Tensor:
    """The gradient of a number with respect to the images; NoGradientError if it is not computed from them."""
    found: tuple[Tensor | None, ...] = (None,)
    if value.requires_grad:
        found = torch.autograd.grad(value, x, retain_graph=retain_graph, allow_unused=True)
    if found[0] is None:
        raise NoGradientError("the loss has no gradient of the images: model and loss must be differentiable")
    return found[0]


def outside_inference(x: Tensor) -> Tensor:
    """A tensor that autograd can use: a copy of one made in inference mode. To be called with that mode off."""
    return x.clone() if x.is_inference() else x
