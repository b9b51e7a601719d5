"""The search that every attack is: climb the loss from one or more starts, and leave the model as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from sparse_adv import ops
from sparse_adv.attacks.checks import Labels, check_labels, classes_of
from sparse_adv.nn import frozen_weights

Loss = Callable[[Tensor, Tensor], Tensor]
"""loss(logits, y) -> the batch's loss, a scalar, or one number per image [N]."""

MODES = ("eval", "train", "batch")


class Ball(NamedTuple):
    """Where images may go: the radius around the clean ones, its norm, and the range of pixel values."""

    eps: float
    norm: str
    lo: float
    hi: float


class Objective(NamedTuple):
    """What an attack climbs: the loss, or its negative where the labels are a target."""

    loss: str | Loss
    targeted: bool = False

    def total(self, logits: Tensor, y: Any) -> Tensor:
        return self._value(logits, y).sum()

    def per_image(self, logits: Tensor, y: Any) -> Tensor:
        value = self._value(logits, y)
        if value.shape == logits.shape[:1]:
            return value
        return torch.cat([self._value(logits[i : i + 1], y[i : i + 1]).view(1) for i in range(len(logits))])

    def _value(self, logits: Tensor, y: Any) -> Tensor:
        value = self.loss(logits, y) if callable(self.loss) else F.cross_entropy(logits, y, reduction="none")
        return -value if self.targeted else value


def divergence(logits: Tensor, y: Tensor) -> Tensor:
    """KL(y || p) of each image, y being log-probabilities: with this loss, a search makes y of the clean images."""
    return F.kl_div(F.log_softmax(logits, 1), y, reduction="none", log_target=True).sum(1)


@dataclass(eq=False)
class Search:
    """An attack with all its settings, to be run on batches; nothing in it waits for a GPU."""

    model: nn.Module
    objective: Objective
    start: Ball | None
    """Where the search begins, at a random point; None for the images themselves."""
    ball: Ball
    alpha: float
    steps: int
    restarts: int
    mode: str
    classes: int | None = None
    """How many the model has, as a run with labels to be checked found out."""

    def run(self, x: Tensor, y: Any, words: Tensor | None, labels: Labels = None) -> Tensor:
        """Climb from each start; per image, return the end of highest objective.

        Args:
            x: float tensor [N, ...], the clean images.
            y: what the loss takes.
            words: int64 tensor [2] on x's device, the random start's key and offset. The offset is moved on past the
                numbers that were read: each restart, and a replay of a graph, reads new ones.
            labels: the labels' range, to be compared with the model's classes.
        """
        model = self.model
        # Outside of inference mode, whose tensors can enter no graph.
        with torch.inference_mode(False), torch.enable_grad(), crafting(model, self.mode), frozen_weights(model):
            if self.objective.loss is divergence:
                with torch.no_grad():
                    y = F.log_softmax(model(x), 1)
            elif isinstance(y, Tensor) and y.is_inference():
                y = y.clone()
            best = self._climb(x, y, words, labels)
            if self.restarts == 1:
                return best
            best_value = self._evaluate(best, y)
            for _ in range(self.restarts - 1):
                adv = self._climb(x, y, words, None)
                value = self._evaluate(adv, y)
                better = value > best_value
                best = adv.where(better.view(-1, *[1] * (x.dim() - 1)), best)
                best_value = value.where(better, best_value)
        return best

    def _climb(self, x: Tensor, y: Any, words: Tensor | None, labels: Labels) -> Tensor:
        adv = self._begin(x, words)
        for _ in range(self.steps):
            logits = self.model(adv.requires_grad_())
            if labels is not None:
                self.classes = classes_of(logits, len(x))
                check_labels(labels, self.classes)
                labels = None
            (grad,) = torch.autograd.grad(self.objective.total(logits, y), adv)
            adv = ops.pgd_step(adv, grad, x, self.alpha, *self.ball)
        return adv

    def _begin(self, x: Tensor, words: Tensor | None) -> Tensor:
        if self.start is None or words is None:
            return x.detach().clone()
        eps, norm, *pixels = self.start
        adv = ops.random_start(x, eps, norm, words, *pixels)
        words[1:].add_((x.numel() + 3) // 4)
        return adv

    @torch.no_grad()
    def _evaluate(self, adv: Tensor, y: Any) -> Tensor:
        return self.objective.per_image(self.model(adv), y)


def attacked(model: nn.Module) -> nn.Module:
    """The model itself: DistributedDataParallel's forward would prepare a gradient exchange that no attack makes."""
    return model.module if isinstance(model, DistributedDataParallel) else model


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
