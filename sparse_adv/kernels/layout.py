"""Where the ops' outputs keep their elements; csrc/layout.h says the same below Python."""

from __future__ import annotations

import torch
from torch import Tensor


def layout_of(tensor: Tensor) -> torch.memory_format:
    """The layout rule of every op: a channels_last tensor gives channels_last, anything else NCHW."""
    if tensor.is_contiguous() or not tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last


def in_layout_of(like: Tensor, tensor: Tensor) -> Tensor:
    """The tensor, copied where needed, in the layout that an op's output has for `like`."""
    return tensor.contiguous(memory_format=layout_of(like))
