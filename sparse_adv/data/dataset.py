"""What a data set is to this library: uint8 images in one tensor per split, on the device, and nothing loaded later."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Split(NamedTuple):
    """Labelled images: uint8 [N, C, H, W], 255 meaning 1.0 (or floats in [0, 1]); and int64 classes [N]."""

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> Split:
        """The same on a device."""
        return Split(self.images.to(device), self.labels.to(device))


class Dataset(NamedTuple):
    """Train on `train`, choose and watch on `validation`, touch `test` once, at the end."""

    train: Split
    validation: Split
    test: Split
    classes: int
    name: str
    """Tells `models` whose statistics to normalise with: "cifar10", "mnist", ..., or any name that it does not know."""

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """[C, H, W] of one image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    def to(self, device: torch.device | str) -> Dataset:
        """The same on a device."""
        return self._replace(
            train=self.train.to(device), validation=self.validation.to(device), test=self.test.to(device)
        )


def hold_out(whole: Split, count: int, seed: int = 0) -> tuple[Split, Split]:
    """Divide images at random into those that remain and `count` that are held out.

    Args:
        whole: all images, on any device.
        count: how many to hold out.
        seed: decides which.

    Returns:
        The rest and the held out, each in random order, on the same device.

    Raises:
        ValueError: if nothing would remain.
    """
    images = len(whole.labels)
    if not 0 <= count < images:
        raise ValueError(f"validation must leave some of {images} images to train on, got {count}")
    order = torch.randperm(images, generator=torch.Generator().manual_seed(seed))
    kept, held = (part.to(whole.labels.device) for part in order.split([images - count, count]))
    return Split(whole.images[kept], whole.labels[kept]), Split(whole.images[held], whole.labels[held])
