"""What the operations of a model return for fewer images than they were traced with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CONSTANTS = (bool, float, str, type(None), slice, torch.dtype, torch.device, torch.memory_format, torch.layout)


def scaled(result: Any, of_one: Any, batch: int, images: int) -> Any:
    """Return what an operation returns for a number of images, from its results for a batch and for one image.

    A number may be the same in both results, or `batch` times as large for the batch; then it is taken to be
    proportional to the number of images. This also holds for the numbers in a shape. Only the shape of a tensor is
    scaled.

    Args:
        result, of_one: for the batch and for one image; tensors on the meta device.
        batch: number of images of `result`, at least 2.
        images: number of images of the result that is returned.

    Raises:
        ValueError: if the results depend on the number of images in any other way.

    Examples:
        >>> scaled(torch.Size([8, 3]), torch.Size([1, 3]), 8, 5)
        torch.Size([5, 3])
        >>> scaled((16, "mean"), (2, "mean"), 8, 3)
        (6, 'mean')
    """
    if type(result) is type(of_one):
        if isinstance(result, Tensor):
            return result.new_empty(scaled(result.shape, of_one.shape, batch, images))
        if isinstance(result, tuple | list) and len(result) == len(of_one):
            return type(result)([scaled(*pair, batch, images) for pair in zip(result, of_one, strict=True)])
        if isinstance(result, (int, *_CONSTANTS)) and result == of_one:
            return result
        if isinstance(result, int) and result == batch * of_one:
            return images * of_one
    raise ValueError(f"{result} for {batch} images and {of_one} for one do not say what is right for {images}")
