"""Random operands that the calls of several ops have."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from helpers.convolution_cases import LAYOUTS
from torch import Tensor

from fuzz.call import Arguments

DTYPES = (torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16)


def some(rng: random.Random, value: Callable[[], Any]) -> Any:
    return value() if rng.random() < 0.5 else None


def random_shape(rng: random.Random) -> tuple[int, int, int, int]:
    sizes = (1, 2, 3, 4, 7, 8, 9, 16, 17, 33)
    return rng.choice((0, 1, 2, 5)), rng.choice(sizes), rng.choice(sizes), rng.choice(sizes)


def random_images(rng: random.Random, shape: tuple[int, ...], dtype: torch.dtype, layout: str | None = None) -> Tensor:
    images = torch.randint(-16, 17, shape).div(8).to(dtype)
    layout = layout or rng.choice(sorted(LAYOUTS))
    return LAYOUTS[layout](images) if len(shape) == 4 else images


def dense_layout(rng: random.Random) -> str:
    return rng.choice(("contiguous", "channels_last"))


def comparable(arguments: Arguments) -> bool:
    """Whether all has values, finite ones: sparse kernels skip the padding, dense ones multiply it by the weight."""
    tensors = [v for v in arguments.values() if isinstance(v, Tensor) and v.is_floating_point()]
    return all(not tensor.is_meta and tensor.isfinite().all() for tensor in tensors)
