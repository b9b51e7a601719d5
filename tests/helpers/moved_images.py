"""Images that an attack moves, and how they are compared: what the tests of its ops share on every device."""

import torch
from torch import Tensor

from helpers.tolerances import assert_close, assert_equal


def step_images(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Adversarial images, a float32 gradient of numbers that every dtype represents exactly, and the clean images."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.rand(shape, generator=generator)
    adv = (clean + 0.3 * torch.randn(shape, generator=generator)).clamp(0, 1)
    return adv.to(dtype), torch.randint(-8, 9, shape, generator=generator) / 16, clean.to(dtype)


def assert_moved_alike(actual: Tensor, expected: Tensor, norm: str) -> None:
    """The same numbers in linf; in l2, where lengths are summed in any order, up to rounding."""
    if norm == "linf":
        assert_equal(actual, expected)
    else:
        assert_close(actual, expected, "elementwise")
