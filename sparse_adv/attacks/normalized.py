"""A model of normalised images as a model of pixels, for `Attack.set_normalization_used`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparse_adv.attacks.ball import Ball
from sparse_adv.attacks.checks import Model, as_module

_UNITS_OF_ROUNDING = 8
"""Undoing a normalisation may leave the range by this many units of rounding, times a bound above 1."""


class Normalized(nn.Module):
    """The model, with mean and std [C] of the images that it takes: (pixels - mean) / std of each channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: Model, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.module, self.traceable = as_module(model)
        self.register_buffer("mean", mean.float().view(-1, 1, 1), persistent=False)
        self.register_buffer("std", std.float().view(-1, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.module(self.apply_to(pixels))

    def apply_to(self, pixels: Tensor) -> Tensor:
        self._check_channels(pixels)
        return (pixels - self.mean.to(pixels)) / self.std.to(pixels)

    def undo(self, images: Tensor, box: Ball) -> Tensor:
        """The pixels; rounding does not take them out of their range, and a wrong normalisation is left to be seen."""
        self._check_channels(images)
        pixels = images * self.std.to(images) + self.mean.to(images)
        inside = box.clamp(pixels)
        bounds = [torch.as_tensor(bound, dtype=pixels.dtype, device=pixels.device).abs() for bound in (box.lo, box.hi)]
        scale = torch.maximum(*(bound.where(bound.isfinite(), 0) for bound in bounds)).clamp_min(1)
        rounding = _UNITS_OF_ROUNDING * torch.finfo(pixels.dtype).eps * scale
        return inside.where((pixels - inside).abs() <= rounding, pixels)

    def _check_channels(self, images: Tensor) -> None:
        count = max(len(self.mean), len(self.std))
        if count > 1 and (images.dim() < 3 or images.shape[-3] != count):
            raise ValueError(
                f"images must have {count} channels, as mean and std of set_normalization_used have, got shape "
                f"{tuple(images.shape)}"
            )
