"""Packs the live blocks of a weight, so that the kernels read each block from contiguous memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor


def pack(
    weight: Tensor,
    blocks: Tensor,
    block: Sequence[int],
    groups: int,
    dtype: torch.dtype,
    scale: Tensor | None = None,
) -> Tensor:
    """Pack the live blocks of a weight, in one pass; does not synchronise with the GPU.

    Args:
        weight: float tensor [K, C/groups, R, S].
        blocks: int32 tensor [n, 4], field of `ops.masked_conv2d_live_blocks.LiveBlocks`.
        block: (bo, bi).
        groups: the convolution's groups.
        dtype: of the result.
        scale: contiguous float tensor [K], factors of the output channels, or None.

    Returns:
        tensor [n, bo, bi], 0 beyond the weight's last channels.
    """
    values = torch.empty(blocks.shape[0], *block, dtype=dtype, device=weight.device)
    if values.numel() == 0:
        return values
    out_channels, in_channels = weight.shape[:2]
    out_step, in_step, row_step, col_step = weight.stride()
    with torch.cuda.device_of(weight):
        pack_kernel[(blocks.shape[0],)](
            weight=weight,
            blocks=blocks,
            values=values,
            scale=scale,
            out_channels=out_channels,
            in_channels=in_channels,
            group_out=out_channels // groups,
            out_step=out_step,
            in_step=in_step,
            row_step=row_step,
            col_step=col_step,
            BLOCK_OUT=block[0],
            BLOCK_IN=block[1],
            num_warps=4,
        )
    return values


@triton.jit(do_not_specialize=["out_channels", "in_channels", "group_out"])
def pack_kernel(
    weight,  # [out_channels, in_channels, rows, cols] of any strides
    blocks,  # int32 [n, 4], (first output channel, first input channel, filter row, filter column)
    values,  # [n, BLOCK_OUT, BLOCK_IN], written
    scale,  # [out_channels], or None
    out_channels,
    in_channels,  # of one group
    group_out,  # output channels of one group
    out_step,
    in_step,
    row_step,
    col_step,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """One live block."""
    number = tl.program_id(0)
    first_out = tl.load(blocks + 4 * number)
    first_in = tl.load(blocks + 4 * number + 1) - first_out // group_out * in_channels
    tap = tl.load(blocks + 4 * number + 2).to(tl.int64) * row_step
    tap += tl.load(blocks + 4 * number + 3).to(tl.int64) * col_step
    k = (first_out + tl.arange(0, BLOCK_OUT))[:, None]
    c = (first_in + tl.arange(0, BLOCK_IN))[None, :]
    valid = (k < out_channels) & (c < in_channels)
    value = tl.load(weight + tap + k.to(tl.int64) * out_step + c.to(tl.int64) * in_step, mask=valid, other=0.0)
    if scale is not None:
        value *= tl.load(scale + k, mask=k < out_channels, other=0.0)
    at = tl.arange(0, BLOCK_OUT)[:, None] * BLOCK_IN + tl.arange(0, BLOCK_IN)[None, :]
    tl.store(values + number.to(tl.int64) * (BLOCK_OUT * BLOCK_IN) + at, value.to(values.dtype.element_ty))
