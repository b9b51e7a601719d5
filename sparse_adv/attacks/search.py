"""The search that every attack is: climb the loss from one or more starts, and leave the model as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from sparse_adv import ops
from sparse_adv.nn import constant_weights
from sparse_adv.ops.random_start import seed_words

Loss = Callable[[Tensor, Tensor], Tensor]
"""loss(logits, y) -> the batch's loss, a scalar, or one number per image [N]."""

MODES = ("eval", "train", "batch")


@dataclass
class Objective:
    """What an attack climbs: the loss, or its negative where the labels are a target."""

    loss: str | Loss
    targeted: bool
    check_labels: bool  # once, at the first logits: they tell the number of classes

    def total(self, logits: Tensor, y: Tensor) -> Tensor:
        return self._value(logits, y).sum()

    def per_image(self, logits: Tensor, y: Tensor) -> Tensor:
        value = self._value(logits, y)
        if value.shape == logits.shape[:1]:
            return value
        return torch.cat([self._value(logits[i : i + 1], y[i : i + 1]).view(1) for i in range(len(logits))])

    def _value(self, logits: Tensor, y: Tensor) -> Tensor:
        if callable(self.loss):
            value = self.loss(logits, y)
        else:
            if self.check_labels:
                _check_range(logits, y)
                self.check_labels = False
            value = F.cross_entropy(logits, y, reduction="none")
        return -value if self.targeted else value


def ascend(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    starts: Sequence[Callable[[], Tensor]],
    step: Callable[[Tensor, Tensor], Tensor],
    steps: int,
    objective: Objective,
    mode: str,
) -> Tensor:
    """Climb from each start; per image, return the end of highest objective."""
    if x.shape[0] == 0:
        return x.detach().clone()
    model = attacked(model)
    with torch.inference_mode(False), torch.enable_grad(), crafting(model, mode), constant_weights(model):
        y = y.clone() if isinstance(y, Tensor) and y.is_inference() else y

        def climb(start: Tensor) -> Tensor:
            adv = start.clone()  # x itself stays untouched, and a tensor of inference mode could enter no graph
            for _ in range(steps):
                adv.requires_grad_()
                (grad,) = torch.autograd.grad(objective.total(model(adv), y), adv)
                adv = step(adv, grad)
            return adv

        best = climb(starts[0]())
        if len(starts) == 1:
            return best
        best_value = _evaluate(model, best, y, objective)
        for start in starts[1:]:
            adv = climb(start())
            value = _evaluate(model, adv, y, objective)
            better = value > best_value
            best = adv.where(better.view(-1, *[1] * (x.dim() - 1)), best)
            best_value = value.where(better, best_value)
    return best


def attacked(model: nn.Module) -> nn.Module:
    """The model itself: DistributedDataParallel's forward would prepare a gradient exchange that no attack makes."""
    return model.module if isinstance(model, DistributedDataParallel) else model


@torch.no_grad()
def _evaluate(model: nn.Module, adv: Tensor, y: Tensor, objective: Objective) -> Tensor:
    return objective.per_image(model(adv), y)


def random_starts(
    x: Tensor, restarts: int, eps: float, norm: str, lo: float, hi: float, generator: torch.Generator | None
) -> list[Callable[[], Tensor]]:
    """Starts that share one drawn key and no random number: each restart reads the counter further on."""
    blocks = torch.tensor([0, (x.numel() + 3) // 4])
    words = seed_words(generator).cpu()
    return [partial(ops.random_start, x, eps, norm, words + restart * blocks, lo, hi) for restart in range(restarts)]


@contextmanager
def crafting(model: nn.Module, mode: str) -> Iterator[None]:
    """The model in an attack's mode; flags are set one by one, since `train()` would not bring back a frozen layer."""
    found = [(module, module.training) for module in model.modules()]
    norms = [module for module, _ in found if isinstance(module, _BatchNorm)]
    tracking = [(module, module.track_running_stats) for module in norms]
    try:
        for module, _ in found:
            module.training = mode != "eval" and isinstance(module, _BatchNorm)
        for module in norms if mode == "batch" else ():
            module.track_running_stats = False  # in training mode: statistics of the batch, the running ones left alone
        yield
    finally:
        for module, training in found:
            module.training = training
        for module, track in tracking:
            module.track_running_stats = track


def _check_range(logits: Tensor, y: Tensor) -> None:
    if logits.dim() != 2 or len(logits) != len(y):
        raise ValueError(f"model must return logits [{len(y)}, classes], got shape {tuple(logits.shape)}")
    low, high = (value.item() for value in y.aminmax())
    if low < 0 or high >= logits.shape[1]:
        raise ValueError(f"y must lie in [0, {logits.shape[1] - 1}], the model's classes, got {low} to {high}")
