"""Adversarial training of any classifier on images in [0, 1]; knows no mask."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from sparse_adv import attacks
from sparse_adv.data import Dataset, Split

Record = dict[str, Any]
"""What is known after an epoch: plain numbers, ready for a line of JSON."""


def _natural(model: nn.Module, x: Tensor, y: Tensor, recipe: Recipe, noise: Generator) -> Tensor:
    return x


def _fgsm(model: nn.Module, x: Tensor, y: Tensor, recipe: Recipe, noise: Generator) -> Tensor:
    return attacks.fgsm_rs(model, x, y, eps=recipe.eps, generator=noise)


def _pgd(model: nn.Module, x: Tensor, y: Tensor, recipe: Recipe, noise: Generator) -> Tensor:
    return attacks.pgd(model, x, y, eps=recipe.eps, alpha=recipe.alpha, steps=recipe.steps, generator=noise)


OBJECTIVES = {"natural": _natural, "fgsm": _fgsm, "pgd": _pgd}
"""The images an update sees: clean ones, one random-start FGSM step (Wong et al. 2020), or PGD (Madry et al. 2018)."""


@dataclass(frozen=True)
class Recipe:
    """How a model is trained and watched; runs of one recipe differ in nothing but their model.

    Attributes:
        objective: "natural", "fgsm" (random start) or "pgd".
        epochs, batch_size: passes over the training images, and images per update.
        lr, momentum, weight_decay: of SGD.
        warmup_epochs: in these the learning rate climbs in equal steps to `lr`.
        drops: the learning rate falls to a tenth where these shares of the epochs have passed.
        eps, alpha, steps: the linf attack: PGD in training and in every evaluation; "fgsm" takes its eps.
        evaluate_every: epochs between evaluations; the last epoch always has one.
        seed: of the order of the images and of the attacks' random starts.
    """

    objective: str = "pgd"
    epochs: int = 30
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup_epochs: int = 0
    drops: tuple[float, ...] = (0.5, 0.75)
    eps: float = 8 / 255
    alpha: float = 2 / 255
    steps: int = 10
    evaluate_every: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f'objective must be one of {", ".join(OBJECTIVES)}, got "{self.objective}"')
        for name in ("epochs", "batch_size", "steps", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "momentum", "weight_decay", "warmup_epochs", "eps", "alpha"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} must be finite and not negative, got {value}")

    def learning_rate(self, epoch: int) -> float:
        """The learning rate of an epoch, counted from 0."""
        climb = min(1.0, (epoch + 1) / self.warmup_epochs) if self.warmup_epochs else 1.0
        fallen = sum(epoch >= math.ceil(drop * self.epochs) for drop in self.drops)
        return self.lr * climb * 0.1**fallen


def train(
    model: nn.Module, dataset: Dataset, recipe: Recipe, on_epoch: Callable[[Record], None] | None = None
) -> list[Record]:
    """Train a model in place with SGD and cross-entropy on the images its objective crafts.

    The test images are not touched. On a CPU the same seed, model and recipe give the same weights bit for bit.

    Args:
        model: any classifier of [N, C, H, W] images in [0, 1]; it ends in eval mode.
        dataset: images on the model's device.
        recipe: everything else.
        on_epoch: called with the record of each epoch as soon as there is one.

    Returns:
        A record per epoch: "epoch" (from 1), "loss" (mean, on the crafted images), "attack_seconds",
        "update_seconds", "evaluation_seconds", "seconds" (attack and update so far), and where it was evaluated
        "clean_accuracy" and "robust_accuracy" on the validation images.

    Raises:
        FloatingPointError: if the loss is no longer a number.
    """
    records = []
    for record in epochs(model, dataset, recipe):
        records.append(record)
        if on_epoch:
            on_epoch(record)
    return records


def epochs(model: nn.Module, dataset: Dataset, recipe: Recipe) -> Iterator[Record]:
    """The same as `train`, an epoch at each turn: runs that take turns can be compared on a machine that is shared."""
    optimizer = torch.optim.SGD(model.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay)
    order = torch.Generator().manual_seed(recipe.seed)
    noise = torch.Generator().manual_seed(recipe.seed + 1)
    seconds = 0.0
    for epoch in range(recipe.epochs):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate(epoch)
        record = {"epoch": epoch + 1, **_train_epoch(model, dataset.train, optimizer, recipe, order, noise)}
        seconds += record["attack_seconds"] + record["update_seconds"]
        record["seconds"] = seconds
        model.eval()
        last = epoch + 1 == recipe.epochs
        if last or (epoch + 1) % recipe.evaluate_every == 0:
            record |= evaluate(model, dataset.validation, recipe)
        yield record


def _train_epoch(
    model: nn.Module,
    images: Split,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    order: Generator,
    noise: Generator,
) -> Record:
    craft = OBJECTIVES[recipe.objective]
    total_loss = attack_seconds = update_seconds = 0.0
    model.train()
    for batch in torch.randperm(len(images.labels), generator=order).split(recipe.batch_size):
        x, y = images.images[batch], images.labels[batch]
        begin = time.perf_counter()
        adv = craft(model, x, y, recipe, noise)
        crafted = time.perf_counter()
        optimizer.zero_grad()
        loss = cross_entropy(model(adv), y)
        loss.backward()
        optimizer.step()
        total_loss += loss.item() * len(y)
        attack_seconds += crafted - begin
        update_seconds += time.perf_counter() - crafted
    if not math.isfinite(total_loss):
        raise FloatingPointError(f"training diverged (loss {total_loss}) at lr {optimizer.param_groups[0]['lr']:g}")
    return {
        "loss": total_loss / len(images.labels),
        "attack_seconds": attack_seconds,
        "update_seconds": update_seconds,
    }


def evaluate(model: nn.Module, images: Split, recipe: Recipe) -> Record:
    """Clean and robust accuracy under the recipe's attack, and the seconds that took."""
    begin = time.perf_counter()
    clean = clean_accuracy(model, images)
    robust = robust_accuracy(model, images, eps=recipe.eps, alpha=recipe.alpha, steps=recipe.steps, seed=recipe.seed)
    return {
        "clean_accuracy": clean,
        "robust_accuracy": robust,
        "evaluation_seconds": time.perf_counter() - begin,
    }


def clean_accuracy(model: nn.Module, images: Split, batch_size: int = 256) -> float:
    """The share of images that the model, in eval mode for it, classifies rightly."""
    return _accuracy(model, images, batch_size, lambda x, y: x)


def robust_accuracy(
    model: nn.Module,
    images: Split,
    *,
    eps: float = 8 / 255,
    alpha: float = 2 / 255,
    steps: int = 10,
    batch_size: int = 256,
    seed: int = 0,
) -> float:
    """The share of images still classified rightly after one linf PGD run with random start (Madry et al. 2018).

    An upper bound: stronger attacks find more. Good for comparing runs, not for publishing a number.
    """
    noise = torch.Generator().manual_seed(seed)
    return _accuracy(
        model,
        images,
        batch_size,
        lambda x, y: attacks.pgd(model, x, y, eps=eps, alpha=alpha, steps=steps, generator=noise),
    )


def _accuracy(model: nn.Module, images: Split, batch_size: int, craft: Callable[[Tensor, Tensor], Tensor]) -> float:
    if not len(images.labels):
        raise ValueError("images must hold at least one image to measure an accuracy")
    was_training = model.training
    model.eval()
    right = 0
    for x, y in zip(images.images.split(batch_size), images.labels.split(batch_size), strict=True):
        adv = craft(x, y)
        with torch.no_grad():
            right += int((model(adv).argmax(1) == y).sum())
    model.train(was_training)
    return right / len(images.labels)
