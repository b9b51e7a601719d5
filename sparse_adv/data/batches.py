"""Shuffled, augmented batches of a split; an epoch depends only on the seed and the number of the epoch."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_adv.argument_types import checks_types
from sparse_adv.data.dataset import Split, check_split

_PADDING = 4


class Batches:
    """An iterable over batches of (float32 images in [0, 1], int64 labels), on the device of the split.

    Each iteration is one epoch. Random numbers are drawn on the CPU and depend only on (seed, epoch), so that a GPU
    gets the same batches and an interrupted run can repeat an epoch.

    Args:
        split: the images, uint8 or float in [0, 1].
        batch_size: images per batch, summed over all processes.
        shuffle: whether each epoch has a new random order.
        augment: whether images are cropped and flipped at random, see `crop_and_flip`.
        seed: seed of order and augmentation.
        rank, world_size: number of this process, and of all processes. Process r takes the images r, r + world_size,
            r + 2 world_size, ... of each batch. With shuffle, up to world_size - 1 images are left out of an epoch so
            that all processes get the same number. Without shuffle no image is left out; in the last batch, a process
            may then have one image less than another, or no batch at all.

    With shuffle, a last batch of one image per process is joined to the batch before it, because BatchNorm cannot be
    trained with one image.

    Raises:
        ValueError: if batch_size is not a multiple of world_size, an argument is out of range, the numbers of images
            and labels differ, images to augment have other dimensions, or a shuffled epoch would have no image for some
            process.
        TypeError: if images or labels are not tensors, or the images are integers other than uint8.

    Examples:
        >>> import torch
        >>> from sparse_adv.data import Batches, Split
        >>> split = Split(torch.full((5, 1, 8, 8), 255, dtype=torch.uint8), torch.arange(5))
        >>> batches = Batches(split, batch_size=2, shuffle=False)
        >>> [labels.tolist() for images, labels in batches]
        [[0, 1], [2, 3], [4]]
        >>> float(next(iter(batches))[0].max())
        1.0
    """

    @checks_types
    def __init__(
        self,
        split: Split,
        batch_size: int,
        *,
        shuffle: bool = True,
        augment: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"batch_size must be a positive multiple of world_size ({world_size}), got {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size - 1}], got {rank}")
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        check_split(split)
        images = len(split.labels)
        if augment and split.images.dim() != 4:
            raise ValueError(f"augment needs images [N, C, H, W], got shape {list(split.images.shape)}")
        if shuffle and images < world_size:
            raise ValueError(f"split must have an image for each of the {world_size} processes, got {images}")
        to_unit(split.images[:0])  # raises TypeError for a wrong dtype
        self.split, self.batch_size, self.shuffle, self.augment = split, batch_size, shuffle, augment
        self.seed, self.rank, self.world_size, self.epoch = seed, rank, world_size, 0
        self._images = images - images % world_size if shuffle else images

    def __len__(self) -> int:
        count = math.ceil(max(0, self._images - self.rank) / self.batch_size)
        return count - self._joins_last(count)

    def _joins_last(self, count: int) -> bool:
        """Whether the last of `count` batches has one image per process and is joined to the one before it."""
        last = self._images - (count - 1) * self.batch_size
        return self.shuffle and count > 1 and last <= self.world_size < self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Set the number, from 0, of the epoch that the next iteration yields; each iteration increments it."""
        if epoch < 0:
            raise ValueError(f"epoch must be at least 0, got {epoch}")
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # The epoch is counted here: the generator would count it only when its first batch is requested.
        epoch, self.epoch = self.epoch, self.epoch + 1
        return self._batches(epoch)

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        # 32 bits, unlike the seeds of `training.random_numbers`, so it differs from all of them.
        sequence = np.random.SeedSequence([self.seed, epoch])
        generator = torch.Generator().manual_seed(int(sequence.generate_state(1)[0]))
        order = (
            torch.randperm(len(self.split.labels), generator=generator, device="cpu")
            if self.shuffle
            else torch.arange(self._images, device="cpu")
        )
        batches = [*order[: self._images].split(self.batch_size)]
        if self._joins_last(len(batches)):
            batches[-2:] = [torch.cat(batches[-2:])]
        batches = batches[: len(self)]
        if not batches:
            return
        own = slice(self.rank, None, self.world_size)
        sizes = [len(batch[own]) for batch in batches]
        # Copy the random numbers of the whole epoch to the GPU at once, without waiting: a copy per batch would leave
        # the GPU idle between batches.
        indices = self._to_device([batch[own] for batch in batches]).split(sizes)
        if self.augment:
            shifts, flips = [], []
            for batch in batches:
                shifts.append(
                    torch.randint(0, 2 * _PADDING + 1, (2, len(batch)), generator=generator, device="cpu")[:, own]
                )
                flips.append((torch.rand(len(batch), generator=generator, device="cpu") < 0.5)[own])
            moves = zip(self._to_device(shifts).split(sizes, 1), self._to_device(flips).split(sizes), strict=True)
        for index in indices:
            images = self.split.images[index]
            if self.augment:
                images = crop_and_flip(images, *next(moves))
            yield to_unit(images), self.split.labels[index]

    def _to_device(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts, -1).to(self.split.images.device, non_blocking=True)


@checks_types
def crop_and_flip(images: Tensor, shifts: Tensor, flips: Tensor) -> Tensor:
    """Crop each image out of itself padded with 4 zeros on each side, and mirror some of them.

    Image n becomes `padded[n, :, shifts[0, n] : shifts[0, n] + H, shifts[1, n] : shifts[1, n] + W]`, mirrored left to
    right where `flips[n]`.

    Args:
        images: [N, C, H, W], any dtype.
        shifts: int64 [2, N], row and column of each crop in the padded image, in [0, 8]; 4 does not move the image.
        flips: bool [N].

    Returns:
        Images of the same shape, dtype and device.

    Raises:
        ValueError: if images have other than four dimensions, or there are not two shifts and a flip for each image.
        IndexError: if a shift is above 8. The host reads no value, because it would wait for a GPU.

    Source: He et al., "Deep residual learning for image recognition" (CVPR 2016), section 4.2.

    Examples:
        >>> import torch
        >>> from sparse_adv.data import crop_and_flip
        >>> image = torch.tensor([[[[1, 2, 3]]]])
        >>> crop_and_flip(image, shifts=torch.tensor([[4], [5]]), flips=torch.tensor([False]))
        tensor([[[[2, 3, 0]]]])
    """
    if images.dim() != 4:
        raise ValueError(f"images must be [N, C, H, W], got shape {list(images.shape)}")
    count, _, height, width = images.shape
    for name, tensor, shape in (("shifts", shifts, (2, count)), ("flips", flips, (count,))):
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    windows = F.pad(images, [_PADDING] * 4).unfold(2, height, 1).unfold(3, width, 1)  # a view: [N, C, 9, 9, H, W]
    cropped = windows[torch.arange(count, device=images.device), :, shifts[0], shifts[1]]
    return torch.where(flips.view(-1, 1, 1, 1), cropped.flip(3), cropped)


@checks_types
def to_unit(images: Tensor) -> Tensor:
    """Convert images to float32 in [0, 1]: uint8 is divided by 255, floats keep their values.

    Args:
        images: uint8 tensor, or float tensor with values in [0, 1], of any shape.

    Returns:
        float32 tensor of the same shape, on the same device.

    Raises:
        TypeError: for other dtypes, whose range of values is unknown.

    Examples:
        >>> import torch
        >>> from sparse_adv.data import to_unit
        >>> to_unit(torch.tensor([0, 51, 255], dtype=torch.uint8))
        tensor([0.0000, 0.2000, 1.0000])
    """
    if images.dtype == torch.uint8:
        return images.float().div_(255)
    if not images.is_floating_point():
        raise TypeError(f"images must be uint8 or float in [0, 1], got {images.dtype}")
    return images.float()
