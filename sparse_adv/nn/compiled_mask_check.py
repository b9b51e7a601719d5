"""A check, in compiled code, that a convolution's mask was not written to: `torch.compile` has no guard for it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sparse_adv.nn.optimizer_hook import version_of

_equal_at = WeakTensorKeyDictionary()
"""Maps a buffer to the version of its content that was compared last, and to the mask that it was compared with."""


def is_exporting() -> bool:
    """`torch.compiler.is_exporting()`; before torch 2.12 that is also True in ordinary compiled code."""
    return torch.compiler._is_exporting_flag


@torch.library.custom_op("sparse_adv::header_of_mask", mutates_args=())
def header_of_mask(header: Tensor, buffer: Tensor, mask: Tensor) -> Tensor:
    """Return a pattern's header if the buffer equals the pattern's mask; the two are compared only after a write.

    The header is passed through, so that no compiler removes the check as unused.
    """
    state = version_of(buffer), mask.data_ptr()
    if _equal_at.get(buffer) != state:
        if not torch.equal(buffer, mask):
            raise RuntimeError(
                "weight_mask was written in place, which a compiled layer cannot see: call "
                "layer.set_mask(layer.weight_mask) after the write"
            )
        _equal_at[buffer] = state
    return header.clone()


@header_of_mask.register_fake
def _(header: Tensor, buffer: Tensor, mask: Tensor) -> Tensor:
    return torch.empty_like(header)
