"""Normalisation as the first layer of a model, so that everyone outside speaks of images in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "mnist": ((0.1307,), (0.3081,)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "digits": ((0.305,), (0.376,)),
}
"""Mean and standard deviation of each channel over the training images."""


class Normalize(nn.Module):
    """(x - mean) / std per channel; attacks and eps stay in image units (RobustBench's rule)."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    @classmethod
    def of(cls, data: str, channels: int) -> Normalize:
        """By the statistics of a data set; mean 0.5 and deviation 0.25 where none are known for so many channels."""
        mean, std = _STATISTICS.get(data, ((), ()))
        return cls(mean, std) if len(mean) == channels else cls([0.5] * channels, [0.25] * channels)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std
