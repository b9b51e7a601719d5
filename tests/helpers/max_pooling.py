"""Max pooling: operands, and what holds of each of its implementations, whose passes have the same arguments."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.tolerances import assert_equal

FORMATS = (torch.contiguous_format, torch.channels_last)
LIKE, POOLED = torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 2, 4)
BYTE = POOLED.to(torch.uint8)
BAD_POOLINGS = {  # what is changed of right arguments, and what is said about it
    "no images": ({"input": torch.zeros(3, 9)}, "images must have 4 dimensions, got 2"),
    "gaps": ({"input": torch.zeros(2, 3, 4, 16)[..., ::2]}, r"without gaps, got strides \[192, 64, 16, 2\]"),
    "window": ({"kernel_size": (0, 2)}, "window of 1 to 255 elements"),
    "large window": ({"kernel_size": (16, 16)}, "window of 1 to 255 elements"),
    "out's size": ({"out": LIKE}, r"must have size \[2, 3, 2, 4\], got \[2, 3, 4, 8\]"),
    "index's size": ({"index": BYTE[:1]}, r"index must have size \[2, 3, 2, 4\], got \[1, 3, 2, 4\]"),
}


def images(*shape: int, dtype: torch.dtype = torch.float32, format: torch.memory_format = FORMATS[0]) -> Tensor:
    """Multiples of 1/4: there are equal elements in most windows."""
    return (torch.randint(-4, 5, shape) / 4).to(dtype).contiguous(memory_format=format)


def assert_refuses(pool: Callable[..., None], change: dict[str, object], message: str) -> None:
    """A forward pass with other arguments says what is wrong with them."""
    right = {"input": LIKE, "kernel_size": (2, 2), "out": POOLED.clone(), "index": BYTE.clone()}
    with pytest.raises(RuntimeError, match=message):
        pool(**right | change)


def assert_takes_nan_and_the_first_of_equals(pool: Callable[..., None]) -> None:
    nan, inf = torch.nan, torch.inf
    windows = [[1, 1, 1, 1], [0, 2, 2, 1], [nan, 3, 4, 5], [3, nan, inf, nan], [-inf] * 4, [-0.0, 0, 0, 0]]
    x = torch.tensor(windows).view(1, 6, 2, 2)
    index = torch.empty(1, 6, 1, 1, dtype=torch.uint8)
    for format in FORMATS:
        out = torch.empty(1, 6, 1, 1)
        pool(x.contiguous(memory_format=format), (2, 2), out=out, index=index)
        expected, indices = F.max_pool2d(x, 2, return_indices=True)
        assert_equal(out, expected)
        assert index.flatten().tolist() == indices.flatten().tolist() == [0, 1, 0, 3, 0, 0]


def assert_stays_in_its_window(backward: Callable[..., None]) -> None:
    """An index out of range writes nothing elsewhere."""
    grad, index, out = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 200, dtype=torch.uint8), torch.ones(1, 1, 2, 2)
    backward(grad, index, (2, 2), out=out)
    assert not out.any()
