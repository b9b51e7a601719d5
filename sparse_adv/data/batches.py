"""Batches of a split: order and augmentation of an epoch follow from its number and the seed alone."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from sparse_adv.data.augmentation import PADDING, crop_and_flip
from sparse_adv.data.dataset import Split


class Batches:
    """Goes through a split once an epoch, in batches of (float32 images in [0, 1], int64 labels) on its device.

    Random numbers are drawn on the CPU, so that a GPU sees the same epoch; and from (seed, epoch), so that a run that
    was stopped can repeat one.

    Args:
        split: the images, uint8 or floats in [0, 1].
        batch_size: images per batch, over all processes.
        shuffle: whether to go in a new order each epoch.
        augment: whether to crop and flip, see `crop_and_flip`.
        seed: of order and augmentation.
        rank, world: this process of how many; process r takes every world-th image of each batch, from the r-th. When
            shuffling, up to world - 1 images that would make unequal shares are left out of an epoch; otherwise none,
            and the last batches of two processes may differ by one image or, if that is none, be missing.

    Raises:
        ValueError: if the batch size is not a multiple of `world`, a number is out of range, images and labels differ
            in number, or there are too few to shuffle.
        TypeError: if the images are whole numbers, but not uint8.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        *,
        shuffle: bool = True,
        augment: bool = False,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch_size < 1 or batch_size % world:
            raise ValueError(f"batch_size must be a positive multiple of the {world} processes, got {batch_size}")
        if not 0 <= rank < world:
            raise ValueError(f"rank must be in [0, {world - 1}], got {rank}")
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        images = len(split.labels)
        if len(split.images) != images:
            raise ValueError(f"split must have a label for each image, got {len(split.images)} images, {images} labels")
        if shuffle and images < world:
            raise ValueError(f"split must have an image for each of the {world} processes, got {images}")
        to_unit(split.images[:0])
        self.split, self.batch_size, self.shuffle, self.augment = split, batch_size, shuffle, augment
        self.seed, self.rank, self.world, self.epoch = seed, rank, world, 0
        self._images = images - images % world if shuffle else images

    def __len__(self) -> int:
        return math.ceil(max(0, self._images - self.rank) / self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; each iteration goes on to the next by itself."""
        if epoch < 0:
            raise ValueError(f"epoch must be at least 0, got {epoch}")
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # Claimed here and not in the generator, which would count only once its first batch is asked for.
        epoch, self.epoch = self.epoch, self.epoch + 1
        return self._batches(epoch)

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        # Data and noise must not share numbers: 0 tells this stream from whatever else is seeded so.
        sequence = np.random.SeedSequence([self.seed, epoch, 0])
        draws = torch.Generator().manual_seed(int(sequence.generate_state(1)[0]))
        order = torch.randperm(len(self.split.labels), generator=draws) if self.shuffle else torch.arange(self._images)
        batches = order[: self._images].split(self.batch_size)[: len(self)]
        if not batches:
            return
        own = slice(self.rank, None, self.world)
        sizes = [len(batch[own]) for batch in batches]
        # All numbers of the epoch travel at once and unawaited: a GPU never stands still for the next batch's.
        index = self._sent([batch[own] for batch in batches]).split(sizes)
        if self.augment:
            shifts, flips = [], []
            for batch in batches:
                shifts.append(torch.randint(0, 2 * PADDING + 1, (2, len(batch)), generator=draws)[:, own])
                flips.append((torch.rand(len(batch), generator=draws) < 0.5)[own])
            moves = zip(self._sent(shifts).split(sizes, 1), self._sent(flips).split(sizes), strict=True)
        for chosen in index:
            images = self.split.images[chosen]
            if self.augment:
                images = crop_and_flip(images, *next(moves))
            yield to_unit(images), self.split.labels[chosen]

    def _sent(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts, -1).to(self.split.images.device, non_blocking=True)


def to_unit(images: Tensor) -> Tensor:
    """Images as float32 in [0, 1]: uint8 divided by 255, floats as they are.

    Raises:
        TypeError: for other dtypes, whose range nobody knows.
    """
    if images.dtype == torch.uint8:
        return images.float().div_(255)
    if not images.is_floating_point():
        raise TypeError(f"images must be uint8 or floats in [0, 1], got {images.dtype}")
    return images.float()
