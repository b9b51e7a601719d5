"""Models whose nearest adversarial examples are known, and what every attack must leave as it was."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from helpers.attacked import batch, make_model, snapshot
from sparse_adv.attacks import losses

Attack = Callable[..., Tensor]


def classified(size: int = 6) -> tuple[nn.Module, Tensor, Tensor]:
    """The small network in eval mode, images, and the classes that it predicts for them."""
    model, (images, _) = make_model().eval(), batch(size=size)
    return model, images, model(images).argmax(1)


class Linear(nn.Module):
    """Logits w_k . x + b_k of flattened images."""

    def __init__(self, classes: int = 4, shape: tuple[int, ...] = (1, 6, 6), seed: int = 0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.fc = nn.Linear(torch.Size(shape).numel(), classes)
        with torch.no_grad():
            self.fc.weight.copy_(torch.randn(self.fc.weight.shape, generator=draw))
            self.fc.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))


def linear_problem(count: int = 8) -> tuple[Linear, Tensor, Tensor]:
    """A linear model, grey images far from the ends of [0, 1], and the classes that it predicts."""
    model = Linear().eval()
    images = 0.5 + 0.1 * (torch.rand(count, 1, 6, 6, generator=torch.Generator().manual_seed(3)) - 0.5)
    return model, images, model(images).argmax(1)


def least_distance(model: Linear, images: Tensor, labels: Tensor, norm: str, target: Tensor | None = None) -> Tensor:
    """The distance of each image to the nearest boundary, or to that of a target: |z_y - z_k| / |w_y - w_k|_dual."""
    logits, weight = model(images).detach(), model.fc.weight.detach()
    gap = logits.gather(1, labels[:, None]) - logits
    slope = (weight[labels][:, None] - weight).norm(p=1 if norm == "linf" else 2, dim=2)
    distances = torch.where(slope > 0, gap / slope, torch.inf)
    return distances.amin(1) if target is None else distances.gather(1, target[:, None]).squeeze(1)


def distances(adv: Tensor, images: Tensor, norm: str) -> Tensor:
    return (adv - images).flatten(1).norm(p=torch.inf if norm == "linf" else 2, dim=1)


def broken(model: nn.Module, adv: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return model(adv).argmax(1) != labels


def moved_over(model: nn.Module, x: Tensor, y: Tensor, found: Tensor) -> Tensor:
    """What a search returns for what it has found: an example over the boundary by more than rounding, else x."""
    for share in (0.0, 1e-4, 1e-3, 1e-2):
        z = (x + (1 + share) * (found - x)).clamp(0, 1)
        logits = model(z[None]).detach()
        rounding = 100 * torch.finfo(z.dtype).eps * logits.abs().max()
        if losses.margin(logits, y[None]) > (rounding if share < 1e-2 else 0):
            return z
    return x


def spoil_gradient(x: Tensor, value: float, pixels: int) -> Tensor:
    """x itself, but the gradient of the first `pixels` pixels of the first image is `value`."""

    class Spoilt(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            gradient = gradient.clone()
            gradient[0].view(-1)[:pixels] = value
            return gradient

    return Spoilt.apply(x)


def assert_leaves_all_as_found(attack: Attack) -> None:
    """Call attack(model, images, labels) in several states; model, gradients, random state and inputs stay."""
    for training, grad, channels_last in product((False, True), repeat=3):
        model, images, labels = classified()
        model.train(training)
        model[1].eval()  # a frozen BatchNorm in a model in training
        model[0].weight.requires_grad_(False)
        if channels_last:
            images = images.to(memory_format=torch.channels_last)
        before, copies, state = snapshot(model), (images.clone(), labels.clone()), torch.get_rng_state()
        with torch.set_grad_enabled(grad):
            adv = attack(model, images, labels)
        assert snapshot(model) == before
        assert torch.equal(images, copies[0]) and torch.equal(labels, copies[1])
        assert torch.equal(torch.get_rng_state(), state)
        assert adv.shape == images.shape and adv.dtype == images.dtype and adv.stride() == images.stride()
        assert not adv.requires_grad and torch.is_grad_enabled()
        assert adv.min() >= 0 and adv.max() <= 1


def assert_works_at_the_edges(attack: Attack) -> None:
    """An empty batch, tensors made in inference mode, images that need a gradient, and float64."""
    model, images, labels = classified()
    assert attack(model, images[:0], labels[:0]).shape == (0, 3, 8, 8)
    with torch.inference_mode():
        adv = attack(model, images.clone(), labels.clone())
        assert not adv.is_inference()
    assert torch.equal(attack(model, images.clone().requires_grad_(), labels), adv)
    assert attack(model.double(), images.double(), labels).dtype == torch.float64
