"""The lists that the kernel of `masked_conv2d` and of its input gradient reads in place of a mask."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Lists(NamedTuple):
    """The live blocks, and the blocks that each tile of channels reads; from `ops.masked_conv2d_live_blocks`."""

    values: Tensor
    """[n, bo, bi]: the weights of the blocks."""
    blocks: Tensor
    """int32 [n, 4]: (first output channel, first input channel, filter row, filter column)."""
    rows: Tensor
    """int32 [tiles, 3], or [phases, tiles, 3]: (first channel, start, end)."""
    order: Tensor | None
    """int32 [n], or [phases, n]: indices into `blocks` that `rows` counts; None: `rows` counts `blocks` itself."""
