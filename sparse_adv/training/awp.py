"""Adversarial weight perturbation: an update uses the gradient at weights that were moved towards a higher loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def weights_to_perturb(model: nn.Module) -> list[nn.Parameter]:
    """The trained parameters with "weight" in their name and more than one dimension.

    Raises:
        ValueError: if there is none.
    """
    weights = [
        parameter
        for name, parameter in model.named_parameters()
        if "weight" in name and parameter.dim() > 1 and parameter.requires_grad
    ]
    if not weights:
        raise ValueError(
            'awp_gamma needs a trained parameter with "weight" in its name and more than one dimension, the model has '
            "none"
        )
    return weights


@contextmanager
def perturbed_weights(model: nn.Module, loss: Callable[[nn.Module], Tensor], gamma: float) -> Iterator[None]:
    """Within the block, move each weight tensor w to w + gamma ||w|| g / ||g||, g being the gradient of a loss.

    The tensors are those of `weights_to_perturb`, and the norm is that of a whole tensor. At the end they have their
    old values, bit for bit. Pruned weights have no gradient and are not moved. BatchNorm's statistics, the gradients in
    `.grad` and the random numbers of layers are used as in any forward pass, but running statistics are not updated. In
    a run of several processes, each perturbs its copy of the weights with the gradient of its own images.

    Args:
        model: in the modes in which the loss is to be computed.
        loss: maps the model to a scalar.
        gamma: size of the perturbation relative to the norm of the weights.

    Raises:
        ValueError: if there is no weight to move.

    Source: Wu et al., "Adversarial weight perturbation helps robust generalization" (NeurIPS 2020), algorithm 1 and
    equations 8 to 10; 1 step. CIFAR-10, PreActResNet-18: PGD-20 accuracy 52.79 -> 55.39 % (the authors' logs).

    Examples:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.constant_(model.weight, 1.0)
        >>> with perturbed_weights(model, lambda model: model(torch.tensor([[3.0, -4.0]])).sum(), gamma=0.5):
        ...     moved = model.weight.detach().clone()
        >>> (moved - 1) / 2**0.5, model.weight.tolist()  # 0.5 * (3, -4) / 5
        (tensor([[ 0.3000, -0.4000]]), [[1.0, 1.0]])
    """
    weights = weights_to_perturb(model)
    with _still_statistics(model):
        gradients = torch.autograd.grad(loss(model), weights, allow_unused=True)
    kept = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight, gradient in zip(weights, gradients, strict=True):
            if gradient is not None:
                # The scaled loss of float16 can overflow; then the weights are not moved.
                factor = gamma * weight.norm() / (gradient.norm() + 1e-20)
                weight.add_((factor * gradient).nan_to_num_(0.0, 0.0, 0.0))
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, before in zip(weights, kept, strict=True):
                weight.copy_(before)


@contextmanager
def _still_statistics(model: nn.Module) -> Iterator[None]:
    """At the end, restore all buffers except masks, including the running statistics."""
    buffers = [buffer for buffer in model.buffers() if buffer.dtype != torch.bool]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
