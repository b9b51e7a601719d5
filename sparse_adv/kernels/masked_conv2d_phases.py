"""Lists of blocks for each phase of a strided input gradient.

With a stride, filter row r reaches only the input rows h with (h + padding - r * dilation) mod stride = 0; columns
likewise. A phase is the set of input pixels with the same (row mod stride, column mod stride).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor


def select_phases(
    blocks: Tensor,
    rows: Tensor,
    order: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Select for each phase the blocks that reach it; does not synchronise with the GPU.

    The result depends only on the mask and the geometry, so several input gradients may read it.

    Args:
        blocks, rows, order: `blocks`, `grad_rows` and `grad_order` of `ops.masked_conv2d_live_blocks.LiveBlocks`.

    Returns:
        int32 tensors [phases, tiles, 3] and [phases, n], the rows and the order of each phase; the phase of (row,
        column) has number `row * stride[1] + column`. In a phase's order only the slices of its rows are written. At
        stride 1 there is one phase: `rows` and `order` unchanged.
    """
    if max(stride) == 1:
        return rows, order
    phases, entries = stride[0] * stride[1], order.shape[0]
    phase_rows = rows.new_empty(phases, *rows.shape)
    phase_order = order.new_empty(phases, entries)
    with torch.cuda.device_of(rows):
        select_phases_kernel[(rows.shape[0], phases)](
            blocks=blocks,
            order=order,
            rows=rows,
            phase_order=phase_order,
            phase_rows=phase_rows,
            entries=entries,
            lists=rows.shape[0],
            stride_h=stride[0],
            stride_w=stride[1],
            pad_h=padding[0],
            pad_w=padding[1],
            dilation_h=dilation[0],
            dilation_w=dilation[1],
            CHUNK=128,
            num_warps=1,
        )
    return phase_rows, phase_order


_GEOMETRY = ["stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w"]


@triton.jit(do_not_specialize=["entries", "lists", *_GEOMETRY])
def select_phases_kernel(
    blocks,  # int32 [n, 4]
    order,  # int32 [entries]
    rows,  # int32 [lists, 3]
    phase_order,  # int32 [phases, entries], written
    phase_rows,  # int32 [phases, lists, 3], written
    entries,
    lists,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    CHUNK: tl.constexpr,  # entries that are read at a time; not tuned
):
    """The entries of one list (program_id 0) that reach one phase (program_id 1), in their order."""
    list_number = tl.program_id(0)
    phase = tl.program_id(1)
    phase_h = phase // stride_w
    phase_w = phase - phase_h * stride_w
    start = tl.load(rows + 3 * list_number + 1)
    end = tl.load(rows + 3 * list_number + 2)
    first = phase * entries + start
    count = 0
    for chunk in range(start, end, CHUNK):
        i = chunk + tl.arange(0, CHUNK)
        number = tl.load(order + i, mask=i < end, other=0)
        r = tl.load(blocks + 4 * number + 2, mask=i < end, other=0)
        s = tl.load(blocks + 4 * number + 3, mask=i < end, other=0)
        reaches = (phase_h + pad_h - r * dilation_h) % stride_h == 0
        reaches &= (phase_w + pad_w - s * dilation_w) % stride_w == 0
        reaches = (reaches & (i < end)).to(tl.int32)
        tl.store(phase_order + first + count + tl.cumsum(reaches) - 1, number, mask=reaches != 0)
        count += tl.sum(reaches)
    row = phase_rows + 3 * (phase * lists + list_number)
    tl.store(row, tl.load(rows + 3 * list_number))
    tl.store(row + 1, first)
    tl.store(row + 2, first + count)
