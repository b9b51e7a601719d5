"""`masked_conv2d` and its input gradient on tensor cores: a matrix product over the live blocks of a mask.

Letters: N images, C input channels, H x W pixels; K output channels, R x S filter; P x Q output pixels.

A program computes one tile of pixels of one tile of channels. It reads the tile's list of live blocks, each (channel
tile to read, tap), gathers the pixels that the tap reads, and multiplies them by the block's packed weights. Blocks
that are not in the list cost nothing. Images are read channels_last: there the 32 or 64 channels of a pixel are one or
two lines of memory. Other layouts are copied to channels_last first: the copy reads each pixel once, while the kernel
reads it once for every live block of its channels. The output is written in its own layout.

The input gradient is the same algorithm with input and output channels exchanged, on the lists by input channel. With a
stride, a tap reaches only the input pixels of one phase (row mod stride, column mod stride). Each phase is then a
convolution of stride 1 with its own taps, on the lists that `masked_conv2d_phases.select_phases` makes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_adv.kernels.epilogue import Epilogue
from sparse_adv.kernels.layout import WIDE_FROM, empty_in_layout_of, in_layout_of, output_size
from sparse_adv.kernels.masked_conv2d_epilogue import store_with_epilogue
from sparse_adv.kernels.masked_conv2d_lists import Lists
from sparse_adv.kernels.masked_conv2d_tiles import check_pixels, convolution_tile, divider, kind_of, quotient
from sparse_adv.kernels.tensor_checks import check_bits

# Programs that run at about the same time form a group. What a group reads fits into the L2 cache (40 MB or more).
_GROUP_BYTES = 2**24


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
    gate: Tensor | None = None,
) -> Tensor:
    """The op `sparse_adv::masked_conv2d` over live blocks; it does not synchronise with the GPU.

    Args:
        input: float tensor [N, C, H, W].
        values: [n, bo, bi], what `masked_conv2d_pack.pack` returned, of the input's dtype.
        blocks, rows: fields of `ops.masked_conv2d_live_blocks.LiveBlocks`.
        weight_size: (K, C/groups, R, S).
        bias, scale: float tensors [K], or None.
        residual: float tensor [N, K, P, Q], or None.
        precision: how float32 is multiplied: "tf32", or "tf32x3", which splits it into three products of tf32. These
            lose 2 of the 24 bits and take a quarter of the time of float32 without tensor cores.
        gate: uint8 tensor laid out as in `ops.empty_gate`, or None: receives the gate of the ReLU.

    Raises:
        RuntimeError: if there is a gate and the output is not channels_last with a multiple of 8 channels.
    """
    pixels = output_size(input.shape[2:], weight_size[2:], stride, padding, dilation)
    output = empty_in_layout_of(input, (input.shape[0], weight_size[0], *pixels))
    if residual is not None:
        residual = in_layout_of(input, residual)
    if gate is not None:
        check_bits("gate", gate, output)
    lists = Lists(values, blocks, rows, None)
    epilogue = Epilogue(_contiguous(scale), _contiguous(bias), residual, relu, gate_out=gate)
    _launch(output, input, lists, epilogue, (stride, padding, dilation), precision, gradient=False)
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
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    precision: str = "tf32x3",
) -> Tensor:
    """The op `sparse_adv::masked_conv2d_grad_input` over live blocks; it does not synchronise with the GPU.

    Args:
        grad_output: float tensor [N, K, P, Q].
        values, blocks, precision: as in `forward`.
        grad_rows, grad_order: what `masked_conv2d_phases.select_phases` made of the fields of `LiveBlocks`.
        input_size: (N, C, H, W).
        residual: float tensor [N, C, H, W], or None: added to the gradient.
        gate: float tensor [N, C, H, W]: the output of a ReLU, whose gradient passes where it is positive; or uint8
            tensor, the bits that `forward` wrote; or None.

    Raises:
        RuntimeError: if a gate of bits does not fit the result.
    """
    output = empty_in_layout_of(grad_output, input_size)
    residual = None if residual is None else in_layout_of(output, residual)
    if gate is not None and gate.dtype == torch.uint8:
        check_bits("gate", gate, output)
    elif gate is not None:
        gate = in_layout_of(output, gate)
    epilogue = Epilogue(residual=residual, gate=gate)
    lists = Lists(values, blocks, grad_rows, grad_order)
    _launch(output, grad_output, lists, epilogue, (stride, padding, dilation), precision, gradient=True)
    return output


def _launch(
    output: Tensor,
    source: Tensor,
    lists: Lists,
    epilogue: Epilogue,
    geometry: tuple[Sequence[int], Sequence[int], Sequence[int]],
    precision: str,
    gradient: bool,
) -> None:
    """Write the product of `source` and the blocks to `output`.

    Args:
        output: [N, K, P, Q], or [N, C, H, W] of the gradient.
        source: the images to read, [N, C, H, W], or [N, K, P, Q] of the gradient.
        geometry: stride, padding and dilation, each (rows, columns).
        gradient: whether this is the input gradient.
    """
    if output.numel() == 0:
        return
    images, channels, *size = output.shape
    stride, padding, dilation = geometry
    phases = stride if gradient else (1, 1)
    tile_rows, tile_cols = (triton.cdiv(length, step) for length, step in zip(size, phases, strict=True))
    pixels = check_pixels(images * tile_rows * tile_cols)
    tiles_of_channels = lists.rows.shape[-2]
    block_out, block_in = lists.values.shape[1:]
    channels_read, channels_written = (block_out, block_in) if gradient else (block_in, block_out)
    kind = kind_of(source, precision)
    lists_of_phases = tiles_of_channels * phases[0] * phases[1]
    tile = convolution_tile(kind, channels_written, pixels, lists_of_phases)
    tiles = triton.cdiv(pixels, tile.pixels)
    group = min(max(_GROUP_BYTES // (tile.pixels * source.shape[1] * source.element_size()), 1), tiles)
    source = source.contiguous(memory_format=torch.channels_last)
    # The last pixel whose offset is computed, before a tap's shift: it may lie outside of the image that is read.
    last_row, last_col = tile_rows - 1, tile_cols - 1
    if not gradient:
        last_row, last_col = last_row * stride[0], last_col * stride[1]
    reached = (((images - 1) * source.shape[2] + last_row) * source.shape[3] + last_col + 1) * source.shape[1]
    image_step, channel_step, row_step, col_step = output.stride()
    row_factor, row_shift = divider(tile_rows)
    col_factor, col_shift = divider(tile_cols)
    with torch.cuda.device_of(output):
        convolve_kernel[(tiles * tiles_of_channels, phases[0] * phases[1])](
            source=source,
            values=lists.values,
            blocks=lists.blocks,
            order=lists.order,
            rows=lists.rows,
            output=output,
            scale=epilogue.scale,
            bias=epilogue.bias,
            residual=epilogue.residual,
            gate=epilogue.gate,
            gate_out=epilogue.gate_out,
            images=images,
            source_channels=source.shape[1],
            source_rows=source.shape[2],
            source_cols=source.shape[3],
            out_channels=channels,
            out_rows=size[0],
            out_cols=size[1],
            image_step=image_step,
            channel_step=channel_step,
            row_step=row_step,
            col_step=col_step,
            row_factor=row_factor,
            row_shift=row_shift,
            col_factor=col_factor,
            col_shift=col_shift,
            tile_rows=tile_rows,
            tile_cols=tile_cols,
            stride_h=stride[0],
            stride_w=stride[1],
            pad_h=padding[0],
            pad_w=padding[1],
            dilation_h=dilation[0],
            dilation_w=dilation[1],
            lists=tiles_of_channels,
            tiles=tiles,
            group=group,
            RELU=epilogue.relu,
            GRADIENT=gradient,
            BLOCK_OUT=block_out,
            BLOCK_IN=block_in,
            # Split operands take three times the registers.
            STEP=32 if kind == "tf32x3" else channels_read,
            PIXELS=tile.pixels,
            PIXELS_FIRST=channels_written < 64,
            PRECISION=precision,
            WIDE=reached >= WIDE_FROM,
            **tile.options,
        )


def _contiguous(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


@triton.jit
def _entry(blocks, order, item, end, STEP: tl.constexpr, PARTS: tl.constexpr, GRADIENT: tl.constexpr):
    """Item `item` of the lists: (index of its block, part of the block, step of channels to read, filter row, column).

    Each block is PARTS items of STEP channels each. All are 0 from `end` on, because entries are read one item ahead.
    """
    valid = item < end
    part = item % PARTS
    number = tl.load(order + item // PARTS, mask=valid, other=0) if GRADIENT else item // PARTS
    block = blocks + 4 * number
    step = tl.load(block if GRADIENT else block + 1, mask=valid, other=0) // STEP + part
    return number, part, step, tl.load(block + 2, mask=valid, other=0), tl.load(block + 3, mask=valid, other=0)


# Layers have many different sizes, and knowing these would not give better code: one kernel serves all.
_SIZES = ["images", "source_rows", "source_cols", "out_rows", "out_cols", "lists", "tiles", "group"]
_SIZES += ["row_factor", "row_shift", "col_factor", "col_shift", "tile_rows", "tile_cols"]
_GEOMETRY = ["stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w"]


@triton.jit(do_not_specialize=[*_SIZES, *_GEOMETRY])
def convolve_kernel(
    # Pointers.
    source,  # [images, source_rows, source_cols, source_channels], the images to read
    values,  # [n, BLOCK_OUT, BLOCK_IN], the weights of the live blocks
    blocks,  # int32 [n, 4], (first output channel, first input channel, filter row, filter column)
    order,  # int32 [phases, n], indices into blocks; None in the forward pass
    rows,  # int32 [phases, lists, 3], (first channel to write, start, end): a slice of order, or of blocks
    output,  # [images, out_channels, out_rows, out_cols] of any strides
    scale,  # [out_channels] or None, and so is bias
    bias,
    residual,  # strided as output, or None
    gate,  # strided as output, or a bit for each element in the order of memory, or None
    gate_out,  # a bit for each element, or None
    # Sizes of the images, and strides of the output.
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
    # Pixels of one phase of an image, and the numbers that `quotient` divides by them with.
    row_factor,
    row_shift,
    col_factor,
    col_shift,
    tile_rows,
    tile_cols,
    # The convolution.
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    # Programs: tiles of channels, tiles of pixels, and tiles of pixels in a group.
    lists,
    tiles,
    group,
    RELU: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    STEP: tl.constexpr,  # channels that one product sums over
    PIXELS: tl.constexpr,  # of a tile
    PIXELS_FIRST: tl.constexpr,  # whether pixels are the rows of the product, and channels its columns
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,  # whether offsets into source need 64 bits
):
    """One tile of pixels (program_id 0, within a group), for one tile of channels and one phase (program_id 1)."""
    PARTS: tl.constexpr = (BLOCK_OUT if GRADIENT else BLOCK_IN) // STEP
    WRITTEN: tl.constexpr = BLOCK_IN if GRADIENT else BLOCK_OUT

    # The tiles of a group read pixels that fit into L2. Within a group, the longest list comes first, for all tiles.
    program = tl.program_id(0)
    first_tile = program // (group * lists) * group
    in_group = tl.minimum(group, tiles - first_tile)
    place = program - first_tile * lists
    tile = first_tile + place % in_group
    phase = tl.program_id(1)
    row = rows + 3 * (phase * lists + place // in_group)

    # h and w are the pixel's row and column within its phase; the forward pass has one phase.
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
    source_h = tl.where(image < images, source_h, -(2**30))  # outside of the image for every tap
    weight_rows = tl.arange(0, STEP if GRADIENT else BLOCK_OUT)
    weight_cols = tl.arange(0, BLOCK_IN if GRADIENT else STEP)
    weight_offsets = weight_rows[:, None] * BLOCK_IN + weight_cols[None, :]
    part_offset: tl.constexpr = STEP * BLOCK_IN if GRADIENT else STEP

    # wgmma takes 64 rows of its first operand at a time. The wider the second operand is, the less it reads from shared
    # memory. So with 64 channels the pixels are the second operand.
    acc = tl.zeros((PIXELS, WRITTEN) if PIXELS_FIRST else (WRITTEN, PIXELS), tl.float32)
    start = tl.load(row + 1) * PARTS
    end = tl.load(row + 2) * PARTS
    # Each entry is loaded one item ahead, because pixels can be prefetched only if their addresses are known.
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
        valid = first + channel < source_channels
        inside = (at_h >= 0) & (at_h < source_rows) & (at_w >= 0) & (at_w < source_cols)
        mask = inside[:, None] & valid[None, :]
        moved = (dh.to(tl.int64) * source_cols + dw) * source_channels + first
        x = tl.load(source + moved + offsets, mask=mask, other=0.0)
        begin = number.to(tl.int64) * (BLOCK_OUT * BLOCK_IN) + part * part_offset
        weight = tl.load(values + begin + weight_offsets)
        number, part, step, r, s = _entry(blocks, order, item + 1, end, STEP, PARTS, GRADIENT)
        kernel = weight if GRADIENT else weight.T
        if PIXELS_FIRST:
            acc = tl.dot(x, kernel, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(kernel.T, x.T, acc, input_precision=PRECISION)

    y = acc if PIXELS_FIRST else acc.T
    out_h = h * stride_h + phase_h if GRADIENT else h
    out_w = w * stride_w + phase_w if GRADIENT else w
    pixel_at = image.to(tl.int64) * image_step + out_h.to(tl.int64) * row_step + out_w.to(tl.int64) * col_step
    exist = (image < images) & (out_h < out_rows) & (out_w < out_cols)
    first_channel = tl.multiple_of(tl.load(row), WRITTEN)
    store_with_epilogue(
        *(y, pixel_at, exist, first_channel, out_channels, channel_step),
        *(output, scale, bias, residual, gate, gate_out),
        RELU,
        PIXELS,
        WRITTEN,
    )
