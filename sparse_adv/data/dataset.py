"""The parts of a data set: labelled images in one tensor per split."""

from __future__ import annotations

from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_adv.argument_types import checks_types


class Split(NamedTuple):
    """Labelled images.

    Args:
        images: uint8 [N, C, H, W] in [0, 255], or float in [0, 1].
        labels: int64 [N], class numbers from 0.

    Examples:
        >>> import torch
        >>> from sparse_adv.data import Split
        >>> split = Split(torch.zeros(10, 3, 32, 32, dtype=torch.uint8), torch.arange(10))
        >>> split.to("cpu").labels[:3]
        tensor([0, 1, 2])
    """

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> Split:
        """Return a copy on another device; tensors that are there already are not copied."""
        return Split(self.images.to(device), self.labels.to(device))


class Dataset(NamedTuple):
    """A data set that is ready for training: `load` returns it.

    Args:
        train: images to train on.
        validation: images to choose the best epoch and hyperparameters with.
        test: images for one final test.
        classes: number of classes.
        name: "cifar10", "mnist", ... or any other name, see `models.Normalize.of`.
        class_names: names of the classes, in the order of their numbers; None if the publisher has fixed the order.

    Examples:
        >>> import torch
        >>> from sparse_adv.data import Dataset, Split, hold_out
        >>> images = Split(torch.zeros(100, 1, 8, 8, dtype=torch.uint8), torch.arange(100) % 5)
        >>> train, validation = hold_out(images, 20)
        >>> Dataset(train, validation, test=images, classes=5, name="squares").input_shape
        (1, 8, 8)
    """

    train: Split
    validation: Split
    test: Split
    classes: int
    name: str
    class_names: tuple[str, ...] | None = None

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape [C, H, W] of one image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    def to(self, device: torch.device | str) -> Dataset:
        """Return a copy on another device; tensors that are there already are not copied."""
        return self._replace(
            train=self.train.to(device), validation=self.validation.to(device), test=self.test.to(device)
        )


class RawDataset(NamedTuple):
    """A data set as its files divide it, on the CPU; most have no validation images."""

    train: Split
    test: Split
    classes: int
    name: str
    validation: Split | None = None
    class_names: tuple[str, ...] | None = None


def check_split(split: Split) -> None:
    """Check the types and lengths of a split.

    Raises:
        TypeError: if images or labels are not tensors, or the labels are not integers.
        ValueError: if there is not one label for each image.
    """
    for name, value in split._asdict().items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} of the split must be a tensor, got {type(value).__name__}")
    images, labels = split
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels of the split must be integers, got {labels.dtype}")
    if labels.dim() != 1 or len(images) != len(labels):
        raise ValueError(
            f"split must have a label for each image, got {len(images)} images, labels of shape {list(labels.shape)}"
        )


@checks_types
def hold_out(split: Split, count: int, seed: int = 0) -> tuple[Split, Split]:
    """Divide labelled images at random into two parts.

    Args:
        split: all images, on any device.
        count: number of images in the second part.
        seed: seed of the random order.

    Returns:
        The remaining images and the `count` images held out, each in random order, on the same device.

    Raises:
        TypeError: if images or labels are no tensors.
        ValueError: if count is negative or leaves no image in the first part, or there is not one label for each image.

    Examples:
        >>> import torch
        >>> from sparse_adv.data import Split, hold_out
        >>> split = Split(torch.zeros(10, 1, 8, 8, dtype=torch.uint8), torch.arange(10))
        >>> train, validation = hold_out(split, 3)
        >>> len(train.labels), len(validation.labels)
        (7, 3)
    """
    check_split(split)
    total = len(split.labels)
    if not 0 <= count < total:
        raise ValueError(f"count must be at least 0 and less than the {total} images of split, got {count}")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed), device="cpu").to(split.labels.device)
    remaining, held_out = order.split([total - count, count])
    return (
        Split(split.images[remaining], split.labels[remaining]),
        Split(split.images[held_out], split.labels[held_out]),
    )


@checks_types
def stratified(split: Split, share: float, seed: int = 0) -> Split:
    """Choose a share of labelled images at random, the same fraction of each class.

    Args:
        split: all images, on any device.
        share: in (0, 1]; of the n images of a class, share n are taken, rounded, and at least one.
        seed: seed of the choice.

    Returns:
        The images chosen, in the order of `split`; for share 1 `split` itself.

    Raises:
        TypeError: if images or labels are no tensors.
        ValueError: if share is not in (0, 1], or there is not one label for each image.

    Examples:
        >>> import torch
        >>> from sparse_adv.data import Split, stratified
        >>> split = Split(torch.zeros(10, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1] * 5))
        >>> stratified(split, 0.4).labels.bincount()
        tensor([2, 2])
    """
    if not isinstance(share, Real) or not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share!r}")
    check_split(split)
    if share == 1:
        return split
    labels = split.labels.cpu()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed), device="cpu")
    chosen = torch.zeros(len(labels), dtype=torch.bool, device="cpu")
    for label in labels.unique():
        of_class = order[labels[order] == label]
        chosen[of_class[: max(1, round(share * len(of_class)))]] = True
    chosen = chosen.to(split.labels.device)
    return Split(split.images[chosen], split.labels[chosen])
