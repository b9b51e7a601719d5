"""Masks of blocks compiled into the lists that the Triton kernels walk."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_SIZES = (32, 64)


def blocks_fit(block: Sequence[int], groups: int, mask_shape: Sequence[int]) -> bool:
    """Whether there are Triton kernels for this block: 32 or 64 channels wide, one tap, none across two groups."""
    out, into, *taps = block
    if out not in _SIZES or into not in _SIZES or any(size != 1 for size in taps):
        return False
    return groups == 1 or (mask_shape[0] // groups % out == 0 and mask_shape[1] % into == 0)


def live_blocks(mask: Tensor, block: Sequence[int], groups: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The kept blocks of a mask, listed by output channels and by input channels.

    Args:
        mask: bool tensor [K, C/groups, R, S] that obeys the block.
        block: (bo, bi) or (bo, bi, 1, 1), one that `blocks_fit`.
        groups: the convolution's groups.

    Returns:
        int32 tensors on the mask's device: `blocks` [n, 4], (first output channel, first input channel counted over
        all groups, filter row, filter column) of each, in this order; `rows`, (first channel, start, end) of a slice of
        `blocks` for each tile of bo output channels, longest first; `grad_rows`, the same for each tile of bi input
        channels and slices of `grad_order`; `grad_order` [n], indices into `blocks`.
    """
    out, into = block[:2]
    grid = mask[::out, ::into]
    out_tile, in_tile, r, s = grid.nonzero().unbind(1)
    group = out_tile * out // max(mask.shape[0] // groups, 1)
    first_in = group * mask.shape[1] + in_tile * into
    blocks = torch.stack([out_tile * out, first_in, r, s], 1).int()
    in_tile = group * grid.shape[1] + in_tile
    grad_order = in_tile.argsort(stable=True).int()
    starts = torch.arange(grid.shape[1], device=mask.device) * into
    grad_starts = torch.arange(groups, device=mask.device)[:, None] * mask.shape[1] + starts
    return (
        blocks,
        _rows(torch.arange(grid.shape[0], device=mask.device) * out, out_tile),
        _rows(grad_starts.flatten(), in_tile),
        grad_order,
    )


def _rows(first_channels: Tensor, tile: Tensor) -> Tensor:
    """(first channel, start, end) per tile, where `tile` names the tile of each entry of the list, ascending or not."""
    lengths = tile.bincount(minlength=len(first_channels))
    ends = lengths.cumsum(0)
    rows = torch.stack([first_channels, ends - lengths, ends], 1)
    return rows[lengths.argsort(descending=True, stable=True)].int()
