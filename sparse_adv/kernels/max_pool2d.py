"""Max pooling with the window's size as stride, and the gradient of its input, in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_adv.kernels.layout import WIDE_FROM, layout_of
from sparse_adv.kernels.tensor_checks import check_layout

_BLOCK = 1024  # windows of a program: each of 4 warps' threads loads 16 bytes of 16-bit channels_last images at a time
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


def forward(input: Tensor, size: tuple[int, int], out: Tensor, index: Tensor | None) -> None:
    """The maximum of each window (the last NaN if there is one) and its position in the window.

    Args:
        input: float tensor [N, C, H, W] without gaps, NCHW or channels_last.
        size: rows and columns of a window, at most 255 elements.
        out: tensor [N, C, H // rows, W // columns] in the layout and dtype of the input, not empty, that is written.
        index: uint8 tensor like out that is written, or None.
    """
    _, channels, rows, cols = input.shape
    pooled = rows // size[0], cols // size[1]
    step = channels if layout_of(input) == torch.channels_last else 1
    windows = out.numel()
    with torch.cuda.device_of(input):
        forward_kernel[(triton.cdiv(windows, _BLOCK),)](
            *(input, out, index, windows, step, rows, cols, *pooled),
            ROWS=size[0],
            COLS=size[1],
            WIDE=input.numel() + _BLOCK >= WIDE_FROM,
            BLOCK=_BLOCK,
            **_OPTIONS,
        )


def backward(
    grad: Tensor, index: Tensor, size: tuple[int, int], residual: Tensor | None, gate: Tensor | None, out: Tensor
) -> None:
    """The gradient of the input, to which a residual is added and a gate applied.

    Args:
        grad, index: tensors like the output of `forward`, which wrote `index`.
        size: rows and columns of a window.
        residual: tensor like out, or None; it may be out.
        gate: uint8 tensor laid out as `ops.empty_gate` says; or a float tensor like out, which lets the gradient pass
            where it is not (<= 0); or None.
        out: tensor [N, C, H, W] in the layout and dtype of grad, not empty, that is written.

    Raises:
        RuntimeError: if the layout of residual or gate is not that of out.
    """
    for name, operand in {"residual": residual, "gate": gate}.items():
        if operand is not None and operand.dtype != torch.uint8:
            check_layout(name, operand, layout_of(out))
    batch, channels, rows, cols = out.shape
    pooled = rows // size[0], cols // size[1]
    covering = triton.cdiv(rows, size[0]), triton.cdiv(cols, size[1])  # windows, and what no window covers
    channels_last = layout_of(out) == torch.channels_last
    windows = batch * channels * covering[0] * covering[1]
    with torch.cuda.device_of(out):
        backward_kernel[(triton.cdiv(windows, _BLOCK),)](
            *(grad, index, residual, gate, out, windows, channels if channels_last else 1, rows, cols),
            *(*pooled, *covering),
            ROWS=size[0],
            COLS=size[1],
            CHANNELS_LAST=channels_last,
            WIDE=windows * size[0] * size[1] + _BLOCK >= WIDE_FROM,
            BLOCK=_BLOCK,
            **_OPTIONS,
        )


@triton.jit
def forward_kernel(
    input,
    out,
    index,  # as out, or None
    windows,
    step,  # elements from one pixel to the next
    rows,  # of the images
    cols,
    pooled_rows,
    pooled_cols,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,  # whether 64 bits number elements, and windows up to the end of the last block
    BLOCK: tl.constexpr,
):
    """Windows whose maxima lie next to each other in memory. A plane is an image, or with NCHW one channel of it."""
    number: tl.constexpr = tl.int64 if WIDE else tl.int32
    accumulate: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    i = tl.program_id(0).to(number) * BLOCK + tl.arange(0, BLOCK)
    exist = i < windows
    col, row = (i // step) % pooled_cols, i // step // pooled_cols % pooled_rows
    plane = i // step // pooled_cols // pooled_rows
    first = ((plane * rows + row * ROWS) * cols + col * COLS) * step + i % step
    largest = tl.full([BLOCK], float("-inf"), accumulate)
    place = tl.zeros([BLOCK], tl.int32)
    for r in range(ROWS):
        for k in range(COLS):
            x = tl.load(input + first + (r * cols + k) * step, exist, 0).to(accumulate)
            larger = (x > largest) | (x != x)
            largest = tl.where(larger, x, largest)
            place = tl.where(larger, r * COLS + k, place)
    tl.store(out + i, largest.to(out.dtype.element_ty), exist)
    if index is not None:
        tl.store(index + i, place.to(tl.uint8), exist)


@triton.jit
def backward_kernel(
    grad,
    index,
    residual,  # as out, or None
    gate,  # bytes of bits or as out, or None
    out,
    windows,
    step,  # elements from one pixel to the next
    rows,  # of the images
    cols,
    pooled_rows,
    pooled_cols,
    covering_rows,  # of windows, with those that the edge of the image cuts, which have no gradient
    covering_cols,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All elements of some windows."""
    number: tl.constexpr = tl.int64 if WIDE else tl.int32
    accumulate: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    i = tl.program_id(0).to(number) * BLOCK + tl.arange(0, BLOCK)
    channel = i % step
    col, row = (i // step) % covering_cols, i // step // covering_cols % covering_rows
    plane = i // step // covering_cols // covering_rows
    whole = (i < windows) & (row < pooled_rows) & (col < pooled_cols)
    at = ((plane * pooled_rows + row) * pooled_cols + col) * step + channel
    g = tl.load(grad + at, whole, 0)
    place = tl.load(index + at, whole, 255)
    for r in range(ROWS):
        for k in range(COLS):
            y, x = row * ROWS + r, col * COLS + k
            exist = (i < windows) & (y < rows) & (x < cols)
            to = ((plane * rows + y) * cols + x) * step + channel
            result = tl.where(place == r * COLS + k, g, 0).to(accumulate)
            if residual is not None:
                result += tl.load(residual + to, exist, 0).to(accumulate)
            if gate is not None:
                if gate.dtype.element_ty == tl.uint8:
                    if CHANNELS_LAST:
                        byte, bit = ((plane * rows + y) * cols + x) * ((step + 7) // 8) + channel // 8, channel % 8
                    else:
                        byte, bit = (plane * rows + y) * ((cols + 7) // 8) + x // 8, x % 8
                    closed = (tl.load(gate + byte, exist, 0).to(tl.int32) >> bit.to(tl.int32)) & 1 == 0
                else:
                    closed = tl.load(gate + to, exist, 0) <= 0
                result = tl.where(closed, 0, result)
            tl.store(out + to, result.to(out.dtype.element_ty), exist)
