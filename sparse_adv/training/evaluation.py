"""Accuracies, clean and under attack, over all processes of a distributed run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_adv import attacks
from sparse_adv.argument_types import check_count, checks_types
from sparse_adv.attacks.checks import (
    InputValidator,
    check_classes,
    count_classes,
    int64_labels,
    is_correct,
    reads_at_once,
)
from sparse_adv.attacks.modes import in_mode
from sparse_adv.config import Norm
from sparse_adv.data import Batches, Split
from sparse_adv.ops.arguments import check_number
from sparse_adv.training import distributed
from sparse_adv.training.checks import first_pass, pairs_of
from sparse_adv.training.random_numbers import Stream, seeded, set_epoch

Images = Split | Iterable[tuple[Tensor, Tensor]]
"""Labelled images: a Split, or batches (images in [0, 1], labels) that can be iterated more than once."""

BATCH_SIZE = 256
"""Images of a batch of a Split."""

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Accuracy:
    """An accuracy, and the passes through the network that it took to measure it."""

    fraction: float
    """Correctly classified images / images."""
    images: int
    forward: int
    """Forward passes, counted per image."""
    backward: int
    """Backward passes down to the image, counted per image."""
    loss: float | None = None
    """Mean cross-entropy under attack, where it was asked for."""
    robust: Tensor | None = field(default=None, repr=False, compare=False)
    """Whether each image of this process was classified correctly, clean and under all attacks; bool [N]."""


@checks_types
def clean_accuracy(model: nn.Module, images: Images, batch_size: int = BATCH_SIZE) -> Accuracy:
    """Measure the fraction of images that the model classifies correctly; one with a NaN among its logits never is.

    Args:
        model: maps images [N, C, H, W] in [0, 1] to logits [N, classes]; evaluated in eval mode and left as it was.
        images: a Split, or an iterable of batches.
        batch_size: images per batch of a Split, for each process.

    Returns:
        The accuracy over the images of all processes, and the passes that it took.

    Raises:
        TypeError, ValueError: if there is no image, images or labels are out of range, or the model's output is not
            logits [N, classes].

    Examples:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> images = [(torch.rand(10, 1, 2, 2), torch.zeros(10, dtype=torch.int64))]
        >>> accuracy = clean_accuracy(model, images)
        >>> 0 <= accuracy.fraction <= 1, accuracy.images, accuracy.backward
        (True, 10, 0)
    """
    return _accuracy(model, images, batch_size, [])


@checks_types
def robust_accuracy(
    model: nn.Module,
    images: Images,
    *,
    eps: float = 8 / 255,
    alpha: float | None = None,
    steps: int = 10,
    restarts: int = 1,
    norm: Norm = "linf",
    loss: str | attacks.Loss = "ce",
    early_stop: bool = False,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    graphs: attacks.Graphs | None = None,
    engine: bool = True,
    every_image: bool = False,
    among: Tensor | None = None,
) -> Accuracy:
    """Measure the fraction of images that the model classifies correctly clean and after each of several PGD attacks.

    On a CPU a restart attacks only the images that all attacks before have left correct. On a GPU it attacks all
    images, so that the host never waits for a count and one CUDA graph serves all batches of a shape; the accuracy is
    the same. It is an upper bound of the robustness, meant for comparing runs; for published numbers use
    `attacks.AutoAttack`.

    Args:
        model, images, batch_size: as in `clean_accuracy`.
        eps, norm, steps: radius, norm and number of steps, as in `attacks.pgd`.
        alpha: step size; None for eps / 4.
        restarts: number of attacks, each from another random start; one success of any of them counts.
        loss: as in `attacks.pgd`; "margin" is mostly the stronger one.
        early_stop: as in `attacks.pgd`: an image counts as wrong if any step finds it misclassified. The passes are
            counted as if no image stopped early.
        seed: of the random starts.
        graphs: CUDA graphs of earlier calls to use again; None for graphs of this call alone.
        engine: as in `attacks.pgd`. The predictions that count are those of the model itself.
        every_image: attack images that are misclassified already too, and measure the mean over all images of the
            cross-entropy under attack, for each image the largest of the restarts.
        among: the images that other attacks left robust, `Accuracy.robust` of theirs: only these can count as robust,
            so that the accuracy is that under all of the attacks together. None for all images.

    Returns:
        The accuracy over the images of all processes, and the passes that it took.

    Raises:
        ValueError: if there is no image, or a value is out of range.

    Source: Madry et al., "Towards deep learning models resistant to adversarial attacks" (ICLR 2018), section 5.

    Examples:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> images = [(torch.rand(10, 1, 2, 2), torch.zeros(10, dtype=torch.int64))]
        >>> robust = robust_accuracy(model, images, eps=0.1, steps=2)
        >>> robust.fraction <= clean_accuracy(model, images).fraction
        True
    """
    check_number("eps", eps)
    check_count("restarts", restarts, least=1)
    generator = torch.Generator().manual_seed(distributed.own_seed(seed, Stream.EVALUATION))
    size = eps / 4 if alpha is None else alpha
    graphs = graphs or attacks.Graphs()
    options: attacks.LossOptions = {
        "generator": generator,
        "check": False,
        "graphs": graphs,
        "engine": engine,
        "early_stop": early_stop,
        "loss": loss,
    }

    def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return attacks.pgd(model, x, y, eps=eps, alpha=size, steps=steps, norm=norm, **options)

    return _accuracy(model, images, batch_size, [attack] * restarts, steps, every_image, among)


@checks_types
def fgsm_accuracy(
    model: nn.Module,
    images: Images,
    *,
    eps: float = 8 / 255,
    norm: Norm = "linf",
    batch_size: int = BATCH_SIZE,
    engine: bool = True,
) -> Accuracy:
    """Measure the fraction of images classified correctly clean and after one gradient step of size eps (FGSM).

    Args:
        model, images, batch_size: as in `clean_accuracy`.
        eps, norm, engine: as in `attacks.fgsm`.

    Returns:
        The accuracy over the images of all processes, and the passes that it took.

    Raises:
        ValueError: if there is no image, or a value is out of range.

    Source: Goodfellow et al., "Explaining and harnessing adversarial examples" (ICLR 2015), section 4.

    Examples:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> images = [(torch.rand(10, 1, 2, 2), torch.zeros(10, dtype=torch.int64))]
        >>> fgsm_accuracy(model, images, eps=0.1).images
        10
    """
    options: attacks.LossOptions = {"check": False, "graphs": attacks.Graphs(), "engine": engine}

    def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return attacks.fgsm(model, x, y, eps=eps, norm=norm, **options)

    return _accuracy(model, images, batch_size, [attack])


def model_device(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter or buffer; the CPU if it has neither."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return next(tensors, torch.empty(0, device="cpu")).device


def as_batches(images: Images, batch_size: int) -> Iterable[tuple[Tensor, Tensor]]:
    """Return the batches of a Split, of which each process gets its part, or batches, with int64 labels.

    Raises:
        TypeError: when a batch is not two tensors.
    """
    if isinstance(images, Split):
        images = Batches(
            images,
            batch_size * distributed.world_size(),
            shuffle=False,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )
    return pairs_of(images)


def check_evaluable(name: str, images: Images, model: nn.Module) -> None:
    """Raise TypeError or ValueError, before any training, if no accuracy on these images could be measured after it.

    The model takes the first batch, in eval mode; of a Split all images and labels are checked.

    Args:
        name: of the argument.
        images: a Split, or batches that are iterated in each evaluation.
        model: whose accuracy is measured.
    """
    if isinstance(images, Iterator | Mapping):
        raise TypeError(
            f"{name} must be a Split or batches that can be iterated in each evaluation (a list, a DataLoader), got "
            f"{type(images).__name__}"
        )
    device = model_device(model)
    try:
        with seeded(0, device), in_mode(model, "eval") as evaluated:  # a DataLoader draws a random number
            first = next(iter(as_batches(images, BATCH_SIZE)), None)
            if first is not None:
                x, y = (tensor.to(device) for tensor in first)
                with first_pass(x):
                    classes = count_classes(_logits(evaluated, x), len(y))
                if isinstance(images, Split) and images.images.is_floating_point():
                    x, y = images.images, int64_labels(images.labels)
                InputValidator(deferred=False).check(x, y, classes)
                if isinstance(images, Split):
                    check_classes(int64_labels(images.labels), classes)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name}: {error}") from error
    if first is None and distributed.world_size() == 1:  # else another process may have images
        raise ValueError(f"{name} must hold at least one image, got none")


def _accuracy(
    model: nn.Module,
    images: Images,
    batch_size: int,
    tries: Sequence[Attack],
    steps: int = 1,
    every_image: bool = False,
    among: Tensor | None = None,
) -> Accuracy:
    if among is not None and among.dtype != torch.bool:
        raise TypeError(f"among must be a bool tensor, got {among.dtype}")
    device = model_device(model)
    at_once = reads_at_once(device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    count = forward = backward = 0
    withstood = [torch.ones(0, dtype=torch.bool, device=device)]
    validator = InputValidator(deferred=not at_once)
    set_epoch(images, 0)
    # Shuffled images come in the same order in each evaluation, so that a run that is continued measures the same.
    with seeded(0, device), in_mode(model, "eval") as model:
        for x, y in as_batches(images, batch_size):
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            logits = _logits(model, x)
            classes = count_classes(logits, len(y))
            robust = is_correct(logits, y)  # robust under all attacks so far
            if among is not None and len(rows := among[count : count + len(y)]) == len(y):
                robust = robust & rows.to(device)
            places = torch.arange(len(y), device=device)
            withstood.append(torch.zeros_like(robust))
            count += len(y)
            forward += len(y)
            y = validator.check(x, y, classes)
            losses = torch.zeros(len(y), device=device)
            for attack in tries:
                if at_once and not every_image:
                    x, y, places, robust = x[robust], y[robust], places[robust], robust[robust]
                    if not len(y):
                        break
                logits = _logits(model, attack(model, x, y))
                robust = robust & is_correct(logits, y)
                if every_image:
                    losses = losses.maximum(F.cross_entropy(logits.float(), y, reduction="none"))
                forward += (steps + 1) * len(y)
                backward += steps * len(y)
            loss_sum += losses.sum()
            correct += robust.sum()
            withstood[-1][places] = robust
    validator.raise_deferred()
    if among is not None and len(among) != count:
        raise ValueError(f"among must have one value for each of {count} images, got {len(among)}")
    totals = distributed.all_reduce_sum(
        [float(correct), float(count), float(forward), float(backward), float(loss_sum)], device
    )
    if not totals[1]:
        raise ValueError("images must hold at least one image to measure an accuracy, got none")
    loss = totals[4] / totals[1] if every_image else None
    forward, backward = int(totals[2]), int(totals[3])
    return Accuracy(totals[0] / totals[1], int(totals[1]), forward, backward, loss, torch.cat(withstood))


@torch.no_grad()
def _logits(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)
