"""A number in the loss that changes from epoch to epoch, read from memory."""

from __future__ import annotations

import torch
from torch import Tensor


class EpochNumber:
    """A number in the device's memory, so that a CUDA graph captured in one epoch reads the number of each later epoch.

    Examples:
        >>> weight = EpochNumber(0.5)
        >>> ones = torch.ones(2)
        >>> before = weight.like(ones)
        >>> weight.set(2.0)
        >>> before, weight.like(ones)
        (tensor(0.5000), tensor(2.))
    """

    def __init__(self, value: float) -> None:
        self._value = value
        self._stored: Tensor | None = None

    def set(self, value: float) -> None:
        """Change the number, between two updates."""
        self._value = value
        if self._stored is not None:
            self._stored.fill_(value)

    def like(self, tensor: Tensor) -> Tensor:
        """The number as a scalar of the tensor's dtype, rounded as PyTorch rounds a Python number in an expression."""
        if self._stored is None:  # in an update without a graph: there is one before each capture
            self._stored = torch.tensor(self._value, dtype=torch.float64, device=tensor.device)
        return self._stored.to(tensor.dtype)
