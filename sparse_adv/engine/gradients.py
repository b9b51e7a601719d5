"""The gradient of a function of the images, or a clear error where there is none."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

LossOfLogits = Callable[[Tensor], Tensor]


class NoGradientError(ValueError):
    """The loss is not computed from the images, or only by operations without a gradient."""


def image_gradient(value: Tensor, x: Tensor, retain_graph: bool = False) -> Tensor:
    """The gradient of a number with respect to the images; NoGradientError if it is not computed from them."""
    found: tuple[Tensor | None, ...] = (None,)
    if value.requires_grad:
        found = torch.autograd.grad(value, x, retain_graph=retain_graph, allow_unused=True)
    if found[0] is None:
        raise NoGradientError("the loss has no gradient of the images: model and loss must be differentiable")
    return found[0]


def outside_inference(x: Tensor) -> Tensor:
    """The tensor as autograd can use it: a copy if it was made in inference mode. Call this with that mode off."""
    return x.clone() if x.is_inference() else x


class Autograd:
    """Logits and gradients as PyTorch computes them."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @torch.inference_mode(False)
    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """What the model returns."""
        return self._model(x)

    @torch.inference_mode(False)
    def gradient(self, x: Tensor, loss: LossOfLogits) -> Tensor:
        """The gradient of the sum of loss(logits) with respect to the input."""
        with torch.enable_grad():
            x = outside_inference(x).detach().requires_grad_()
            return image_gradient(loss(self._model(x)).sum(), x)
