"""Accuracy: clean, and under attack with restarts. Over all processes of a distributed run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparse_adv import attacks
from sparse_adv.attacks.checks import InputValidator, count_classes
from sparse_adv.data import Batches, Split
from sparse_adv.training import distributed
from sparse_adv.training.devices import reads_at_once

Images = Split | Iterable[tuple[Tensor, Tensor]]
"""Labelled images: a Split, or batches (images in [0, 1], labels) that can be gone through more than once."""

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]


class Accuracy(float):
    """A share of images, that knows how many they were and how many passes through the network it took."""

    images: int
    forward: int
    backward: int

    def __new__(cls, right: float, images: int, forward: int, backward: int) -> Accuracy:
        found = super().__new__(cls, right / images)
        found.images, found.forward, found.backward = images, forward, backward
        return found


def clean_accuracy(model: nn.Module, images: Images, batch_size: int = 256) -> Accuracy:
    """The share of images that the model, in eval mode for it, classifies rightly.

    Args:
        model: maps images in [0, 1] to logits.
        images: a Split, or an iterable of batches.
        batch_size: of a Split's batches.

    Raises:
        ValueError: if there is no image.
    """
    return _accuracy(model, images, batch_size, [])


def robust_accuracy(
    model: nn.Module,
    images: Images,
    *,
    eps: float = 8 / 255,
    alpha: float | None = None,
    steps: int = 10,
    restarts: int = 1,
    norm: str = "linf",
    seed: int = 0,
    batch_size: int = 256,
    graphs: attacks.Graphs | None = None,
) -> Accuracy:
    """The share of images that are classified rightly, clean and after every one of several PGD attacks.

    On a CPU each restart attacks only what the ones before left standing; on a GPU it attacks all images: nobody waits
    for a count, and batches of one shape are served by one CUDA graph. An upper bound on robustness: stronger attacks
    find more. Good for comparing runs; published numbers need AutoAttack.

    Args:
        model, images, batch_size: as in `clean_accuracy`.
        eps, norm, steps: as in `attacks.pgd`.
        alpha: step size; None for eps / 4.
        restarts: number of attacks, each from a random start of its own.
        seed: of the random starts.
        graphs: where the attacks are kept from call to call; None keeps them for this one.

    Source: Madry et al., "Towards deep learning models resistant to adversarial attacks" (ICLR 2018), section 5.
    """
    noise = torch.Generator().manual_seed(distributed.own_seed(seed))
    size = eps / 4 if alpha is None else alpha
    options: attacks.LossOptions = {"generator": noise, "check": False, "graphs": graphs or attacks.Graphs()}

    def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return attacks.pgd(model, x, y, eps=eps, alpha=size, steps=steps, norm=norm, **options)

    return _accuracy(model, images, batch_size, [attack] * restarts, steps)


def fgsm_accuracy(
    model: nn.Module, images: Images, *, eps: float = 8 / 255, norm: str = "linf", batch_size: int = 256
) -> Accuracy:
    """The share of images classified rightly, clean and after one signed step of size eps (Goodfellow et al. 2015)."""
    options: attacks.LossOptions = {"check": False, "graphs": attacks.Graphs()}

    def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return attacks.fgsm(model, x, y, eps=eps, norm=norm, **options)

    return _accuracy(model, images, batch_size, [attack])


def _accuracy(model: nn.Module, images: Images, batch_size: int, tries: Sequence[Attack], steps: int = 1) -> Accuracy:
    device = device_of(model)
    at_once = reads_at_once(device)
    right = torch.zeros((), dtype=torch.int64, device=device)
    counts = dict.fromkeys(("images", "forward", "backward"), 0)
    validator = InputValidator(deferred=not at_once)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for x, y in batches_of(images, batch_size):
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            logits = _logits(model, x)
            standing = logits.argmax(1) == y
            counts["images"] += len(y)
            counts["forward"] += len(y)
            if tries:
                y = validator.check(x, y, count_classes(logits, len(y)))
            for attack in tries:
                if at_once:
                    x, y, standing = x[standing], y[standing], standing[standing]
                    if not len(y):
                        break
                standing = standing & (_logits(model, attack(model, x, y)).argmax(1) == y)
                counts["forward"] += (steps + 1) * len(y)
                counts["backward"] += steps * len(y)
            right += standing.sum()
    finally:
        for module, training in modes:
            module.training = training
    validator.raise_deferred()
    totals = distributed.all_reduce_sum([float(right), *(float(value) for value in counts.values())], device)
    if not totals[1]:
        raise ValueError("images must hold at least one image to measure an accuracy")
    return Accuracy(*(int(value) for value in totals))


def batches_of(images: Images, batch_size: int) -> Iterable[tuple[Tensor, Tensor]]:
    """The batches of a Split, or those that were given; a process of several gets its own part of a Split."""
    if isinstance(images, Split):
        return Batches(
            images,
            batch_size * distributed.world_size(),
            shuffle=False,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )
    return images


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer lives; the CPU if it has none."""
    first: Any = next(model.parameters(), None)
    if first is None:
        first = next(model.buffers(), torch.empty(0))
    return first.device


@torch.no_grad()
def _logits(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)
