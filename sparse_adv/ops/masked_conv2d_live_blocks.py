"""Block masks compiled into the lists of live blocks that the Triton kernels read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_adv.ops.masked_conv2d_mask import block_grid

_SIZES = (32, 64)


class LiveBlocks(NamedTuple):
    """The blocks that a mask keeps, listed by output channels and by input channels; int32 tensors.

    A tile is the bo output channels, or the bi input channels, that one block covers.
    """

    rows: Tensor
    """[tiles, 3]: for each tile of output channels (first channel, start, end), its slice of `blocks`; longest
    first."""
    blocks: Tensor
    """[n, 4]: (first output channel, first input channel counted over all groups, filter row, filter column) of each
    block, sorted in this order."""
    grad_rows: Tensor
    """[tiles, 3]: the same as `rows` for each tile of input channels, with slices of `grad_order`."""
    grad_order: Tensor
    """[n]: indices into `blocks`."""


def blocks_fit(block: Sequence[int], groups: int, mask_shape: Sequence[int]) -> bool:
    """Whether there are Triton kernels for this block: 32 or 64 channels wide, one tap, within one group."""
    out, into, *taps = block
    if out not in _SIZES or into not in _SIZES or any(size != 1 for size in taps):
        return False
    return groups == 1 or (mask_shape[0] // groups % out == 0 and mask_shape[1] % into == 0)


def live_blocks(mask: Tensor, block: Sequence[int], groups: int = 1) -> LiveBlocks:
    """List the blocks that a mask keeps.

    Args:
        mask: bool tensor [K, C/groups, R, S] that obeys the block.
        block: (bo, bi) or (bo, bi, 1, 1), accepted by `blocks_fit`.
        groups: the convolution's groups.

    Returns:
        The lists, on the mask's device.

    Examples:
        >>> mask = torch.zeros(64, 32, 1, 1, dtype=torch.bool)
        >>> mask[32:] = True
        >>> live_blocks(mask, (32, 32)).blocks
        tensor([[32,  0,  0,  0]], dtype=torch.int32)
    """
    out, into = block[:2]
    grid = block_grid(mask, block)
    out_tile, in_tile, r, s = grid.nonzero().unbind(1)
    group = out_tile * out // max(mask.shape[0] // groups, 1)
    first_in = group * mask.shape[1] + in_tile * into
    blocks = torch.stack([out_tile * out, first_in, r, s], 1).int()
    in_tile = group * grid.shape[1] + in_tile
    grad_order = in_tile.argsort(stable=True).int()
    starts = torch.arange(grid.shape[1], device=mask.device) * into
    grad_starts = torch.arange(groups, device=mask.device)[:, None] * mask.shape[1] + starts
    out_starts = torch.arange(grid.shape[0], device=mask.device) * out
    return LiveBlocks(_rows(out_starts, out_tile), blocks, _rows(grad_starts.flatten(), in_tile), grad_order)


def _rows(first_channels: Tensor, tile: Tensor) -> Tensor:
    """(first channel, start, end) of each tile, longest first; `tile` is the tile of each block, in any order."""
    lengths = tile.bincount(minlength=len(first_channels))
    ends = lengths.cumsum(0)
    rows = torch.stack([first_channels, ends - lengths, ends], 1)
    return rows[lengths.argsort(descending=True, stable=True)].int()
