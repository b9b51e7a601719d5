"""Makes a model of pixels from a model of normalised images, for `Attack.set_normalization_used`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn

from sparse_adv.argument_types import shortened
from sparse_adv.attacks.as_module import Model, as_module
from sparse_adv.attacks.ball import Ball, of_channels
from sparse_adv.attacks.checks import check_has_values
from sparse_adv.ops.arguments import check_tensors

_UNITS_OF_ROUNDING = 8
"""Undoing a normalisation may leave the range by this many units of rounding, times a bound if it is above 1."""


class Normalized(nn.Module):
    """The model, with mean and std [C] of the images that it takes: (pixels - mean) / std of each channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: Model, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.module, self.traceable = as_module(model)
        self.register_buffer("mean", mean.float(), persistent=False)
        self.register_buffer("std", std.float(), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.module(self.apply_to(pixels))

    def apply_to(self, pixels: Tensor) -> Tensor:
        return normalized(pixels, self.mean, self.std)

    def undo(self, images: Tensor, box: Ball) -> Tensor:
        """The pixels. Rounding does not take them out of their range; a wrong normalisation may, so that it shows."""
        mean, std = _for_images(images, self.mean, self.std)
        pixels = images * std + mean
        inside = box.clamp(pixels)
        bounds = [torch.as_tensor(bound, dtype=pixels.dtype, device=pixels.device).abs() for bound in (box.lo, box.hi)]
        scale = torch.maximum(*(bound.where(bound.isfinite(), 0) for bound in bounds)).clamp_min(1)
        rounding = _UNITS_OF_ROUNDING * torch.finfo(pixels.dtype).eps * scale
        return inside.where((pixels - inside).abs() <= rounding, pixels)


@fx.wrap  # one node of a trace: it looks at shapes
def normalized(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(pixels - mean) / std of each channel.

    Args:
        pixels: float tensor [N, C, ...].
        mean, std: float tensors [C] or [1].

    Raises:
        ValueError: if there is another number of channels.
    """
    mean, std = _for_images(pixels, mean, std)
    return (pixels - mean) / std


def channel_statistics(mean: object, std: object) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, float [C]; TypeError or ValueError for other values."""
    values = []
    for name, given in (("mean", mean), ("std", std)):
        if isinstance(given, Tensor):
            check_tensors(**{name: given})
        try:
            values.append(torch.as_tensor(given, dtype=torch.float32).detach().flatten())
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise TypeError(f"{name} must be numbers, one for each channel, got {shortened(given)}") from None
        check_has_values(name, values[-1])
        if not len(values[-1]) or not bool(values[-1].isfinite().all()) or (name == "std" and values[-1].min() <= 0):
            least = "positive and " if name == "std" else ""
            raise ValueError(f"{name} must be {least}finite, got {shortened(values[-1].tolist())}")
    if len({len(each) for each in values} - {1}) > 1:
        raise ValueError(
            f"mean and std must have one value for each channel, got {len(values[0])} and {len(values[1])}"
        )
    return values[0], values[1]


def _for_images(images: Tensor, *statistics: Tensor) -> Iterator[Tensor]:
    """Mean and std in a shape that broadcasts with the images."""
    count = max(map(len, statistics))
    if count > 1 and (images.dim() < 2 or images.shape[1] != count):
        raise ValueError(f"images must have {count} channels, as mean and std have, got shape {tuple(images.shape)}")
    return (of_channels(values, images) for values in statistics)
