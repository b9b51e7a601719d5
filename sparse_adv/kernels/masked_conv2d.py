"""`masked_conv2d` and its input gradient on tensor cores: a matrix product over the live blocks of a mask alone.

Letters: N images, C input channels, H x W pixels; K output channels, R x S filter; P x Q output pixels.

A program computes one tile of pixels of one tile of channels: it walks the tile's list of live blocks, (channel tile it
reads, tap), gathers the pixels that the tap reaches, and multiplies them by the block's packed weights. What is not in
the list costs nothing. Images are read channels_last, where the 32 or 64 channels of a pixel are one or two lines of
memory; others are copied once, as each pixel is read once for every live block of its channels. The output is written
in its own layout.

The input gradient is the same walk with the roles of the channels exchanged, on the lists by input channel. With a
stride, a tap reaches only the input pixels of one phase (row mod stride, column mod stride), so that each phase is a
convolution of stride 1 with taps of its own; `_select_phases` cuts the lists accordingly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_adv.kernels.layout import in_layout_of, layout_of, output_size
from sparse_adv.kernels.masked_conv2d_tiles import check_size, convolution_tile, divider, kind_of, quotient

# What a group of programs that run at about the same time reads stays in the L2 cache, of 40 MB and more.
_GROUP_BYTES = 2**24

# Elements from which on 32 bits do not number them; in what is smaller, offsets take half of the registers.
_WIDE_FROM = 2**31


def forward(
    input: Tensor,
    values: Tensor,
    blocks: Tensor,
    rows: Tensor,
    weight_size: Sequence[int],
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
    precision: str = "tf32x3",
) -> Tensor:
    """The op `sparse_adv::masked_conv2d` over live blocks; never waits for the device.

    Args:
        input: float tensor [N, C, H, W].
        values: [n, bo, bi], what `masked_conv2d_pack.pack` returned, of the input's dtype.
        blocks, rows: what `ops.live_blocks` returned.
        weight_size: (K, C/groups, R, S).
        precision: how float32 is multiplied: as "tf32", or split into three products of it, "tf32x3", which lose 2 of
            the 24 bits and take a quarter of the time of float32 without tensor cores.
    """
    pixels = output_size(input.shape[2:], weight_size[2:], stride, padding, dilation)
    output = _empty_like_layout(input, (input.shape[0], weight_size[0], *pixels))
    if residual is not None:
        residual = in_layout_of(input, residual)
    fused = (None, _dense(scale), _dense(bias), residual)
    _launch(output, input, values, blocks, None, rows, *fused, stride, padding, dilation, relu, precision, False)
    return output


def grad_input(
    grad_output: Tensor,
    values: Tensor,
    blocks: Tensor,
    grad_rows: Tensor,
    grad_order: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    relu_output: Tensor | None = None,
    scale: Tensor | None = None,
    precision: str = "tf32x3",
) -> Tensor:
    """The op `sparse_adv::masked_conv2d_grad_input` over live blocks; never waits for the device.

    Args:
        grad_output: float tensor [N, K, P, Q].
        values, blocks, precision: as in `forward`.
        grad_rows, grad_order: what `ops.live_blocks` returned.
        input_size: (N, C, H, W).
        relu_output: [N, K, P, Q], the output of a ReLU that followed: grad_output counts as 0 where this is not
            positive.
        scale: [K], a factor of grad_output; their product is rounded to its dtype.
    """
    output = _empty_like_layout(grad_output, input_size)
    if max(stride) > 1:
        grad_rows, grad_order = _phases(blocks, grad_rows, grad_order, stride, padding, dilation)
    gate = None if relu_output is None else relu_output.contiguous(memory_format=torch.channels_last)
    fused = (gate, _dense(scale), None, None)
    lists = (blocks, grad_order, grad_rows)
    _launch(output, grad_output, values, *lists, *fused, stride, padding, dilation, False, precision, True)
    return output


def _launch(
    output: Tensor,
    source: Tensor,
    values: Tensor,
    blocks: Tensor,
    order: Tensor | None,
    rows: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    relu: bool,
    precision: str,
    gradient: bool,
) -> None:
    if output.numel() == 0:
        return
    images, channels, *size = output.shape
    phases = stride if gradient else (1, 1)
    tile_rows, tile_cols = (triton.cdiv(length, step) for length, step in zip(size, phases, strict=True))
    pixels = check_size(images * tile_rows * tile_cols)
    lists = rows.shape[-2]
    block_out, block_in = values.shape[1:]
    read, written = (block_out, block_in) if gradient else (block_in, block_out)
    kind = kind_of(source, precision)
    changed = gate is not None or (gradient and scale is not None)
    tile = convolution_tile(kind, written, pixels, lists * phases[0] * phases[1], changed)
    tiles = triton.cdiv(pixels, tile.pixels)
    source = source.contiguous(memory_format=torch.channels_last)
    with torch.cuda.device_of(output):
        convolve_kernel[(tiles * lists, phases[0] * phases[1])](
            *(source, values, blocks, order, rows, output, gate, scale, bias, residual),
            *(images, source.shape[1], *source.shape[2:], channels, *size, *output.stride()),
            *(*divider(tile_rows), *divider(tile_cols), tile_rows, tile_cols),
            *(*stride, *padding, *dilation, lists, tiles),
            min(max(_GROUP_BYTES // (tile.pixels * source.shape[1] * source.element_size()), 1), tiles),
            RELU=relu,
            GRADIENT=gradient,
            BLOCK_OUT=block_out,
            BLOCK_IN=block_in,
            # Split operands take three times the registers.
            STEP=32 if kind == "tf32x3" else read,
            PIXELS=tile.pixels,
            PIXELS_FIRST=written < 64 or changed,
            PRECISION=precision,
            WIDE=source.numel() >= _WIDE_FROM,
            **tile.options,
        )


def _phases(
    blocks: Tensor,
    rows: Tensor,
    order: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """For each phase of a strided gradient, row phase first, the rows and the order of the blocks that reach it."""
    phases, entries = stride[0] * stride[1], order.shape[0]
    phase_rows = rows.new_empty(phases, *rows.shape)
    phase_order = order.new_empty(phases, entries)
    with torch.cuda.device_of(rows):
        select_phases_kernel[(rows.shape[0], phases)](
            *(blocks, order, rows, phase_order, phase_rows, entries, rows.shape[0], *stride, *padding, *dilation),
            CHUNK=128,
            num_warps=1,
        )
    return phase_rows, phase_order


def _empty_like_layout(like: Tensor, size: Sequence[int]) -> Tensor:
    return torch.empty(tuple(size), dtype=like.dtype, device=like.device, memory_format=layout_of(like))


def _dense(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


@triton.jit
def _entry(blocks, order, item, end, STEP: tl.constexpr, PARTS: tl.constexpr, GRADIENT: tl.constexpr):
    """Item `item` of the lists: the number of its block, the step of channels that it reads, its tap; at end, anything.

    Each of the blocks is PARTS items, of STEP channels each.
    """
    there = item < end
    part = item % PARTS
    number = tl.load(order + item // PARTS, mask=there, other=0) if GRADIENT else item // PARTS
    block = blocks + 4 * number
    step = tl.load(block if GRADIENT else block + 1, mask=there, other=0) // STEP + part
    return number, part, step, tl.load(block + 2, mask=there, other=0), tl.load(block + 3, mask=there, other=0)


# Sizes of layers come in many values, and none of these makes the code better: one compiled kernel serves all.
_SIZES = ["images", "source_rows", "source_cols", "out_rows", "out_cols", "lists", "tiles", "group"]
_SIZES += ["row_factor", "row_shift", "col_factor", "col_shift", "tile_rows", "tile_cols"]
_GEOMETRY = ["stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w"]


@triton.jit(do_not_specialize=[*_SIZES, *_GEOMETRY])
def convolve_kernel(
    source,
    values,
    blocks,
    order,
    rows,
    output,
    gate,
    scale,
    bias,
    residual,
    images,
    source_channels,
    source_rows,
    source_cols,
    out_channels,
    out_rows,
    out_cols,
    image_step,
    channel_step,
    row_step,
    col_step,
    row_factor,
    row_shift,
    col_factor,
    col_shift,
    tile_rows,
    tile_cols,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    lists,
    tiles,
    group,
    RELU: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    STEP: tl.constexpr,
    PIXELS: tl.constexpr,
    PIXELS_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    PARTS: tl.constexpr = (BLOCK_OUT if GRADIENT else BLOCK_IN) // STEP
    WRITTEN: tl.constexpr = BLOCK_IN if GRADIENT else BLOCK_OUT

    # Groups of tiles whose pixels fit into L2; within one, the longest list first for all of its tiles.
    program = tl.program_id(0)
    first_tile = program // (group * lists) * group
    in_group = tl.minimum(group, tiles - first_tile)
    place = program - first_tile * lists
    tile = first_tile + place % in_group
    phase = tl.program_id(1)
    row = rows + 3 * (phase * lists + place // in_group)

    # A pixel's row and column count within its phase; phase_h, step_h are 0, stride_h in the forward pass.
    pixel = tile * PIXELS + tl.arange(0, PIXELS)
    line = quotient(pixel, col_factor, col_shift)
    image = quotient(line, row_factor, row_shift)
    h = line - image * tile_rows
    w = pixel - line * tile_cols
    phase_h = phase // stride_w
    phase_w = phase - phase_h * stride_w
    source_h = h if GRADIENT else h * stride_h
    source_w = w if GRADIENT else w * stride_w
    channel = tl.arange(0, STEP)
    offsets = ((image.to(tl.int64) * source_rows + source_h) * source_cols + source_w) * source_channels
    offsets = (offsets if WIDE else offsets.to(tl.int32))[:, None] + channel[None, :]
    source_h = tl.where(image < images, source_h, -(2**30))  # outside, wherever a tap goes
    weight_rows = tl.arange(0, STEP if GRADIENT else BLOCK_OUT)
    weight_cols = tl.arange(0, BLOCK_IN if GRADIENT else STEP)
    weight_offsets = weight_rows[:, None] * BLOCK_IN + weight_cols[None, :]
    part_offset: tl.constexpr = STEP * BLOCK_IN if GRADIENT else STEP

    # wgmma takes its first operand 64 rows at a time, and reads the less from shared memory the wider the second is:
    # pixels come second where the channels are 64. From registers it takes the first alone.
    acc = tl.zeros((PIXELS, WRITTEN) if PIXELS_FIRST else (WRITTEN, PIXELS), tl.float32)
    start = tl.load(row + 1) * PARTS
    end = tl.load(row + 2) * PARTS
    # Each entry is loaded one block ahead: loads of pixels can run ahead only if they wait for no load themselves.
    number, part, step, r, s = _entry(blocks, order, start, end, STEP, PARTS, GRADIENT)
    for item in range(start, end):
        if GRADIENT:
            dh = (phase_h + pad_h - r * dilation_h) // stride_h
            dw = (phase_w + pad_w - s * dilation_w) // stride_w
        else:
            dh = r * dilation_h - pad_h
            dw = s * dilation_w - pad_w
        at_h = source_h + dh
        at_w = source_w + dw
        first = step * STEP
        there = first + channel < source_channels
        inside = (at_h >= 0) & (at_h < source_rows) & (at_w >= 0) & (at_w < source_cols)
        mask = inside[:, None] & there[None, :]
        moved = (dh.to(tl.int64) * source_cols + dw) * source_channels + first
        x = tl.load(source + moved + offsets, mask=mask, other=0.0)
        if GRADIENT:
            if gate is not None:
                x = tl.where(tl.load(gate + moved + offsets, mask=mask, other=0.0) <= 0, 0.0, x)
            if scale is not None:
                factor = tl.load(scale + first + channel, mask=there, other=0.0).to(tl.float32)
                x = (x.to(tl.float32) * factor[None, :]).to(source.dtype.element_ty)
        packed = number.to(tl.int64) * (BLOCK_OUT * BLOCK_IN) + part * part_offset
        weight = tl.load(values + packed + weight_offsets)
        number, part, step, r, s = _entry(blocks, order, item + 1, end, STEP, PARTS, GRADIENT)
        kernel = weight if GRADIENT else weight.T
        if PIXELS_FIRST:
            acc = tl.dot(x, kernel, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(kernel.T, x.T, acc, input_precision=PRECISION)

    y = acc if PIXELS_FIRST else acc.T
    out_h = h * stride_h + phase_h if GRADIENT else h
    out_w = w * stride_w + phase_w if GRADIENT else w
    k = tl.multiple_of(tl.load(row), WRITTEN) + tl.arange(0, WRITTEN)
    there = k < out_channels
    at = image.to(tl.int64) * image_step + out_h.to(tl.int64) * row_step + out_w.to(tl.int64) * col_step
    at = at[:, None] + (k.to(tl.int64) * channel_step)[None, :]
    mask = ((image < images) & (out_h < out_rows) & (out_w < out_cols))[:, None] & there[None, :]
    if not GRADIENT:
        if scale is not None:
            y *= tl.load(scale + k, mask=there, other=0.0).to(tl.float32)[None, :]
        if bias is not None:
            y += tl.load(bias + k, mask=there, other=0.0).to(tl.float32)[None, :]
        if residual is not None:
            y += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
        if RELU:
            y = tl.where(y < 0, 0.0, y)  # NaN stays
    tl.store(output + at, y.to(output.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["entries", "lists", *_GEOMETRY])
def select_phases_kernel(
    blocks,
    order,
    rows,
    phase_order,
    phase_rows,
    entries,
    lists,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    CHUNK: tl.constexpr,
):
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
