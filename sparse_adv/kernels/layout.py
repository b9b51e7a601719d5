"""Sizes and memory layout of the ops' outputs; csrc/common/layout.h has the same layout rule."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MAX_PIXELS = 2**30
"""The Triton kernels of masked convolutions number the pixels of a batch with 32 bits, and take fewer than this."""
WIDE_FROM = 2**31
"""Tensors of this many elements or more need 64-bit offsets; smaller ones take 32 bits, in half the registers."""


def layout_of(tensor: Tensor) -> torch.memory_format:
    """The layout rule of every op: a channels_last tensor gives channels_last, anything else NCHW."""
    if tensor.is_contiguous() or not tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last


def output_like(tensor: Tensor) -> Tensor:
    """Uninitialised memory for an op's output with the shape and dtype of its input, in the layout of the rule."""
    return torch.empty_like(tensor, memory_format=layout_of(tensor))


def in_layout_of(like: Tensor, tensor: Tensor) -> Tensor:
    """The tensor, copied if needed, in the layout that an op's output has for the input `like`."""
    return tensor.contiguous(memory_format=layout_of(like))


def empty_in_layout_of(like: Tensor, size: Sequence[int]) -> Tensor:
    """Uninitialised memory of this size, with the dtype and device of `like`, in the layout of the rule."""
    return torch.empty(tuple(size), dtype=like.dtype, device=like.device, memory_format=layout_of(like))


def output_size(
    image: Sequence[int],
    filter: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:
    """Rows and columns of a convolution's output: floor((size + 2 padding - dilation (filter - 1) - 1) / stride) + 1.

    Args:
        image, filter: rows and columns of the input and of the filter.
        stride, padding, dilation: (rows, columns).

    Examples:
        >>> output_size((32, 32), (3, 3), stride=(2, 2), padding=(1, 1), dilation=(1, 1))
        (16, 16)
    """
    rows, cols = (
        (size + 2 * pad - spread * (taps - 1) - 1) // step + 1
        for size, taps, step, pad, spread in zip(image, filter, stride, padding, dilation, strict=True)
    )
    return rows, cols
