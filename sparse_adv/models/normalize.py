"""Normalisation as the first layer of a network, so that images outside of it are always in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "mnist": ((0.1307,), (0.3081,)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "digits": ((0.305,), (0.376,)),
}
"""Mean and standard deviation of each channel over the training images in [0, 1]."""


class Normalize(nn.Module):
    """Return (x - mean) / std for each channel.

    As the first layer of a network, it lets attacks and their eps use the units of images in [0, 1], as in RobustBench.

    Args:
        mean, std: one number per channel; they become buffers of shape [C, 1, 1].

    Examples:
        >>> import torch
        >>> from sparse_adv.models import Normalize
        >>> Normalize(mean=[0.5], std=[0.25])(torch.tensor([[[[0.5, 1.0]]]]))
        tensor([[[[0., 2.]]]])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.get_default_dtype()).view(-1, 1, 1))

    @classmethod
    def of(cls, data: str, channels: int) -> Normalize:
        """Return the layer for a data set.

        Args:
            data: "cifar10", "cifar100", "mnist", "fashion_mnist" or "digits". For any other name, or if that data set
                has another number of channels, mean 0.5 and standard deviation 0.25 are used.
            channels: number of channels of the images.
        """
        mean, std = STATISTICS.get(data, ((), ()))
        return cls(mean, std) if len(mean) == channels else cls([0.5] * channels, [0.25] * channels)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std
