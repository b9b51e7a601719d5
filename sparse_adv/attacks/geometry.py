"""Distances between images, and numbers of images in a shape that broadcasts with them."""

from __future__ import annotations

import torch
from torch import Tensor


def per_image(values: Tensor, images: Tensor) -> Tensor:
    """One number per image [N] in a shape that broadcasts with the images [N, ...]."""
    return values.view(-1, *[1] * (images.dim() - 1))


def distance(adv: Tensor, images: Tensor, norm: str) -> Tensor:
    """The distance of each pair of images [N], "linf" or "l2"."""
    return torch.linalg.vector_norm((adv - images).flatten(1), torch.inf if norm == "linf" else 2, dim=1)
