"""The weight gradient of `masked_conv2d` for the live blocks of a mask.

Letters: N images, C input channels, H x W pixels; K output channels, R x S filter; P x Q output pixels.

A program takes one live block and one share of the output pixels, and sums over these pixels the products of the 32 or
64 channels of grad_output with those of the input under the block's tap. A second kernel adds the shares in a fixed
order and rounds once, so that all calls give the same bits. Atomic additions would not make this kernel unnecessary,
because the float32 sums must be converted to the weight's layout and dtype anyway.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_adv.kernels.layout import empty_in_layout_of
from sparse_adv.kernels.masked_conv2d_tiles import (
    check_pixels,
    divider,
    gradient_shares,
    gradient_tile,
    kind_of,
    quotient,
)


def grad_weight(
    grad_output: Tensor,
    input: Tensor,
    blocks: Tensor,
    block: Sequence[int],
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    precision: str = "tf32x3",
) -> Tensor:
    """The op `sparse_adv::masked_conv2d_grad_weight` over live blocks; it does not synchronise with the GPU.

    Args:
        grad_output: float tensor [N, K, P, Q].
        input: float tensor [N, C, H, W], of the same dtype.
        blocks: int32 tensor [n, 4], field of `ops.masked_conv2d_live_blocks.LiveBlocks`.
        block: (bo, bi).
        weight_size: (K, C/groups, R, S).
        precision: how float32 is multiplied, see `masked_conv2d.forward`.

    Returns:
        float tensor [K, C/groups, R, S] in the input's layout, exactly 0 outside the live blocks.
    """
    # If images are channels_last, training has weights in that layout too, and PyTorch would copy a gradient with
    # another layout than its weight's.
    grad = empty_in_layout_of(input, weight_size).zero_()
    images, out_channels, out_rows, out_cols = grad_output.shape
    pixels = check_pixels(images * out_rows * out_cols)
    live = blocks.shape[0]
    if live == 0 or pixels == 0:
        return grad
    grad_output, input = (x.contiguous(memory_format=torch.channels_last) for x in (grad_output, input))
    tile = gradient_tile(kind_of(input, precision))
    shares = gradient_shares(pixels, live, tile)
    share = triton.cdiv(triton.cdiv(pixels, shares), tile.pixels) * tile.pixels
    row_factor, row_shift = divider(out_rows)
    col_factor, col_shift = divider(out_cols)
    sums = torch.empty(shares, live, *block, dtype=torch.float32, device=input.device)
    with torch.cuda.device_of(input):
        sum_products_kernel[(live, shares)](
            grad_output=grad_output,
            input=input,
            blocks=blocks,
            sums=sums,
            pixels=pixels,
            share=share,
            live=live,
            out_channels=out_channels,
            in_channels=input.shape[1],
            rows=input.shape[2],
            cols=input.shape[3],
            row_factor=row_factor,
            row_shift=row_shift,
            col_factor=col_factor,
            col_shift=col_shift,
            out_rows=out_rows,
            out_cols=out_cols,
            stride_h=stride[0],
            stride_w=stride[1],
            pad_h=padding[0],
            pad_w=padding[1],
            dilation_h=dilation[0],
            dilation_w=dilation[1],
            BLOCK_OUT=block[0],
            BLOCK_IN=block[1],
            PIXELS=tile.pixels,
            PRECISION=precision,
            **tile.options,
        )
        add_shares_kernel[(live, block[0] // _ROWS)](
            sums=sums,
            blocks=blocks,
            grad=grad,
            shares=shares,
            live=live,
            group_out=weight_size[0] // groups,
            out_channels=weight_size[0],
            in_channels=weight_size[1],
            stride_k=grad.stride(0),
            stride_c=grad.stride(1),
            stride_row=grad.stride(2),
            stride_col=grad.stride(3),
            BLOCK_OUT=block[0],
            BLOCK_IN=block[1],
            ROWS=_ROWS,
            TOGETHER=min(_TOGETHER, triton.next_power_of_2(shares)),
            num_warps=4,
        )
    return grad


_ROWS = 8  # rows of a block that one program of `add_shares_kernel` adds
_TOGETHER = 16  # shares that it loads at a time: few live blocks have hundreds, and each load waits for memory

_GEOMETRY = ["rows", "cols", "row_factor", "row_shift", "col_factor", "col_shift", "out_rows", "out_cols"]
_GEOMETRY += ["stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w"]


@triton.jit(do_not_specialize=["pixels", "share", "live", *_GEOMETRY])
def sum_products_kernel(
    grad_output,  # [images, out_rows, out_cols, out_channels]
    input,  # [images, rows, cols, in_channels]
    blocks,  # int32 [live, 4], (first output channel, first input channel, filter row, filter column)
    sums,  # float32 [shares, live, BLOCK_OUT, BLOCK_IN], written
    pixels,  # of all output images
    share,  # pixels of one share
    live,
    out_channels,
    in_channels,
    rows,
    cols,
    row_factor,
    row_shift,
    col_factor,
    col_shift,
    out_rows,
    out_cols,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    PIXELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One live block (program_id 0) and one share of the pixels (program_id 1)."""
    number = tl.program_id(0)
    block = blocks + 4 * number
    k = tl.load(block) // BLOCK_OUT * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    c = tl.load(block + 1) // BLOCK_IN * BLOCK_IN + tl.arange(0, BLOCK_IN)
    dh = tl.load(block + 2) * dilation_h - pad_h
    dw = tl.load(block + 3) * dilation_w - pad_w

    # wgmma takes 64 rows of its first operand at a time, so the wider block side comes first.
    OUT_FIRST: tl.constexpr = BLOCK_OUT >= BLOCK_IN
    acc = tl.zeros((BLOCK_OUT, BLOCK_IN) if OUT_FIRST else (BLOCK_IN, BLOCK_OUT), tl.float32)
    start = tl.program_id(1) * share
    end = tl.minimum(start + share, pixels)
    for first in range(start, end, PIXELS):
        pixel = first + tl.arange(0, PIXELS)
        line = quotient(pixel, col_factor, col_shift)
        image = quotient(line, row_factor, row_shift)
        h = (line - image * out_rows) * stride_h + dh
        w = (pixel - line * out_cols) * stride_w + dw
        inside = (pixel < end) & (h >= 0) & (h < rows) & (w >= 0) & (w < cols)
        at = ((image.to(tl.int64) * rows + h) * cols + w) * in_channels
        x = tl.load(input + at[:, None] + c[None, :], mask=inside[:, None] & (c < in_channels)[None, :], other=0.0)
        at = pixel.to(tl.int64) * out_channels
        valid = (pixel < end)[:, None] & (k < out_channels)[None, :]
        grad = tl.load(grad_output + at[:, None] + k[None, :], mask=valid, other=0.0)
        if OUT_FIRST:
            acc = tl.dot(grad.T, x, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(x.T, grad, acc, input_precision=PRECISION)

    total = acc if OUT_FIRST else acc.T
    place = (tl.program_id(1).to(tl.int64) * live + number) * (BLOCK_OUT * BLOCK_IN)
    at = tl.arange(0, BLOCK_OUT)[:, None] * BLOCK_IN + tl.arange(0, BLOCK_IN)[None, :]
    tl.store(sums + place + at, total)


@triton.jit(
    do_not_specialize=["shares", "live", "group_out", "out_channels", "in_channels", "stride_row", "stride_col"]
)
def add_shares_kernel(
    sums,  # float32 [shares, live, BLOCK_OUT, BLOCK_IN]
    blocks,  # int32 [live, 4]
    grad,  # [out_channels, in_channels, filter rows, filter columns], written
    shares,
    live,
    group_out,  # output channels of one group
    out_channels,
    in_channels,
    stride_k,  # of grad
    stride_c,
    stride_row,
    stride_col,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    ROWS: tl.constexpr,
    TOGETHER: tl.constexpr,  # shares that are loaded at a time
):
    """ROWS rows (program_id 1) of one live block (program_id 0)."""
    number = tl.program_id(0)
    place = tl.arange(0, ROWS * BLOCK_IN)
    at = number.to(tl.int64) * (BLOCK_OUT * BLOCK_IN) + tl.program_id(1) * (ROWS * BLOCK_IN) + place
    totals = tl.zeros((TOGETHER, ROWS * BLOCK_IN), tl.float32)
    for first in range(0, shares, TOGETHER):
        share = first + tl.arange(0, TOGETHER)
        offsets = share.to(tl.int64)[:, None] * live * (BLOCK_OUT * BLOCK_IN) + at[None, :]
        totals += tl.load(sums + offsets, mask=(share < shares)[:, None], other=0.0)
    total = tl.sum(totals, 0)
    first_out = tl.load(blocks + 4 * number)
    k = first_out + tl.program_id(1) * ROWS + place // BLOCK_IN
    c = tl.load(blocks + 4 * number + 1) - first_out // group_out * in_channels + place % BLOCK_IN
    tap = tl.load(blocks + 4 * number + 2) * stride_row + tl.load(blocks + 4 * number + 3) * stride_col
    at = k.to(tl.int64) * stride_k + c * stride_c + tap
    tl.store(grad + at, total.to(grad.dtype.element_ty), mask=(k < out_channels) & (c < in_channels))
