"""Distances between images, and one number per image in a shape that broadcasts with the images."""

from __future__ import annotations

import torch
from torch import Tensor


def per_image(values: Tensor, images: Tensor) -> Tensor:
    """One number per image [N] in a shape that broadcasts with the images [N, ...]."""
    return values.view(-1, *[1] * (images.dim() - 1))


def divisor(x: Tensor) -> Tensor:
    """x >= 0 as a divisor: at least 1e-12, or the least normal number of its dtype if that is larger."""
    return x.clamp_min(max(1e-12, torch.finfo(x.dtype).tiny))


def l2_unit(x: Tensor) -> Tensor:
    """Each image of x [N, ...] divided by its l2 norm, even if the dtype cannot hold the norm; zeros stay zeros."""
    length = torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=torch.float64)
    length = length.to(torch.promote_types(x.dtype, torch.float32))
    return (x / per_image(length.where(length > 0, 1), x)).to(x.dtype)


def direction(gradient: Tensor, norm: str) -> Tensor:
    """The direction of a step: the sign for "linf", each image's unit vector for "l2"."""
    return gradient.sign() if norm == "linf" else l2_unit(gradient)


def distance(adv: Tensor, images: Tensor, norm: str) -> Tensor:
    """The distance of each pair of images [N], "linf" or "l2"."""
    return torch.linalg.vector_norm((adv - images).flatten(1), torch.inf if norm == "linf" else 2, dim=1)
