"""Random crop and flip of a whole batch at once, where it lies."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PADDING = 4


def crop_and_flip(images: Tensor, shifts: Tensor, flips: Tensor) -> Tensor:
    """Crop each image, padded with 4 zeros on each side, at its own place, and mirror some of them.

    `padded[n, :, shifts[0, n] : shifts[0, n] + H, shifts[1, n] : shifts[1, n] + W]`, then mirrored left to right where
    `flips[n]`.

    Args:
        images: [N, C, H, W], any dtype.
        shifts: int64 [2, N], rows then columns, each in [0, 8]; 4 leaves an image in place.
        flips: bool [N].

    Returns:
        Images of the same shape, dtype and device.

    Source: He et al., "Deep residual learning for image recognition" (CVPR 2016), section 4.2.
    """
    count, _, height, width = images.shape
    windows = F.pad(images, [PADDING] * 4).unfold(2, height, 1).unfold(3, width, 1)  # a view: [N, C, 9, 9, H, W]
    cropped = windows[torch.arange(count, device=images.device), :, shifts[0], shifts[1]]
    return torch.where(flips.view(-1, 1, 1, 1), cropped.flip(3), cropped)
