"""Accuracies, clean and under attack, over all processes of a distributed run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_adv import attacks
from sparse_adv.argument_types import check_count, checks_types
from sparse_adv.attacks.checks import InputValidator, check_classes, count_classes, int64_labels, reads_at_once
from sparse_adv.attacks.modes import in_mode
from sparse_adv.attacks.success import is_correct
from sparse_adv.config import Norm
from sparse_adv.data import Batches, Split
from sparse_adv.masks.layers import device_of
from sparse_adv.ops.arguments import check_number
from sparse_adv.training import distributed
from sparse_adv.training.checks import first_pass, pairs_of
from sparse_adv.training.random_numbers import Stream, seeded, set_epoch

Images = Split | Iterable[tuple[Tensor, Tensor]]
"""Labelled images: a Split, or batches (images in [0, 1], labels) that can be iterated more than once."""

BATCH_SIZE = 256
"""Number of images in a batch of a Split."""

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
    """Mean cross-entropy under attack, if it was requested."""
    robust: Tensor | None = field(default=None, repr=False, compare=False)
    """Whether each image of this process was classified correctly, clean and under all attacks; bool [N]."""


@checks_types
def clean_accuracy(model: nn.Module, images: Images, batch_size: int = BATCH_SIZE) -> Accuracy:
    """Measure the fraction of images that the model classifies correctly; a NaN among an image's logits counts as
    wrong.

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
    """Measure the fraction of images that the model classifies correctly, both clean and after each of several PGD
    attacks.

    On a CPU a restart attacks only the images that all earlier attacks left correct. On a GPU it attacks all images, so
    that the host never waits for a count and one CUDA graph serves all batches of a shape. The accuracy is the same. It
    is an upper bound on the robustness, meant for comparing runs; for published numbers use `attacks.AutoAttack`.

    Args:
        model, images, batch_size: as in `clean_accuracy`.
        eps, norm, steps: radius, norm and number of steps, as in `attacks.pgd`.
        alpha: step size; None for eps / 4.
        restarts: number of attacks, each from another random start; an image counts as wrong if any of them succeeds.
        loss: as in `attacks.pgd`; "margin" is usually stronger.
        early_stop: as in `attacks.pgd`: an image counts as wrong if any step finds it misclassified. The passes are
            counted as if no image stopped early.
        seed: of the random starts.
        graphs: CUDA graphs of earlier calls to use again; None for graphs of this call alone.
        engine: as in `attacks.pgd`. The predictions that count are those of the model itself.
        every_image: also attack images that are already misclassified, and measure the mean cross-entropy under attack
            over all images, with the largest value of the restarts for each image.
        among: the images that other attacks left robust, from their `Accuracy.robust`. Only these can count as robust,
            so the accuracy is the one under all the attacks together. None for all images.

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


def as_batches(images: Images, batch_size: int) -> Iterable[tuple[Tensor, Tensor]]:
    """Return the given batches, or this process's part of a Split in batches, with int64 labels.

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
    """Raise TypeError or ValueError before any training if an accuracy on these images could not be measured after it.

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
    device = device_of(model)
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
    if first is None and distributed.world_size() == 1:  # with more processes, another one may have images
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
    device = device_of(model)
    at_once = reads_at_once(device)
    count = attacked = 0
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    robust = [torch.ones(0, dtype=torch.bool, device=device)]
    validator = InputValidator(deferred=not at_once)
    set_epoch(images, 0)
    # Shuffled images come in the same order in each evaluation, so that a continued run measures the same.
    with seeded(0, device), in_mode(model, "eval") as model:
        for x, y in as_batches(images, batch_size):
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            logits = _logits(model, x)
            classes = count_classes(logits, len(y))
            correct = is_correct(logits, y)
            if among is not None and len(rows := among[count : count + len(y)]) == len(y):
                correct = correct & rows.to(device)
            y = validator.check(x, y, classes)
            withstood, losses, times = _under_attack(model, x, y, correct, tries, every_image, at_once)
            robust.append(withstood)
            count, attacked = count + len(y), attacked + times
            loss_sum += losses.sum()
    validator.raise_deferred()
    if among is not None and len(among) != count:
        raise ValueError(f"among must have one value for each of {count} images, got {len(among)}")
    own = torch.cat(robust)
    sums = [float(own.sum()), float(count), float(attacked), float(loss_sum)]
    right, total, tried, loss = distributed.all_reduce_sum(sums, device)
    if not total:
        raise ValueError("images must hold at least one image to measure an accuracy, got none")
    forward, backward = int(total + (steps + 1) * tried), int(steps * tried)
    return Accuracy(right / total, int(total), forward, backward, loss / total if every_image else None, own)


def _under_attack(
    model: nn.Module, x: Tensor, y: Tensor, robust: Tensor, tries: Sequence[Attack], every_image: bool, at_once: bool
) -> tuple[Tensor, Tensor, int]:
    """Attack a batch several times.

    Args:
        robust: the images that count, those which the model classifies correctly.
        every_image: whether to attack images that a former attack has succeeded on too, for their losses.
        at_once: whether values are read at once; else the host would wait to leave images out.

    Returns:
        The images that withstood all attacks, bool [N]; the highest loss of each, 0 without `every_image`; how many
        images were attacked, one that was attacked twice counted twice.
    """
    withstood, losses, attacked = torch.zeros_like(robust), torch.zeros(len(y), device=y.device), 0
    places = torch.arange(len(y), device=y.device)
    for attack in tries:
        if at_once and not every_image:
            x, y, places, robust = x[robust], y[robust], places[robust], robust[robust]
            if not len(y):
                break
        logits = _logits(model, attack(model, x, y))
        robust = robust & is_correct(logits, y)
        if every_image:
            losses = losses.maximum(F.cross_entropy(logits.float(), y, reduction="none"))
        attacked += len(y)
    withstood[places] = robust
    return withstood, losses, attacked


@torch.no_grad()
def _logits(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)
