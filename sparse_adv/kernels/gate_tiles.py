"""Tiles of images and gates in Triton kernels: where they lie in memory, bits to bytes and back."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def places(q, c, positions, channels, rows, cols, padded, CHANNELS_LAST: tl.constexpr):
    """The offsets [positions, channels] of elements, and which of them exist."""
    if CHANNELS_LAST:
        offsets = q[:, None] * channels + c[None, :]
        exist = (q < positions)[:, None] & (c < channels)[None, :]
    else:
        row, col = q // padded, q % padded
        image, row = row // rows, row % rows
        offsets = ((image[:, None] * channels + c[None, :]) * rows + row[:, None]) * cols + col[:, None]
        exist = ((q < positions) & (col < cols))[:, None] & (c < channels)[None, :]
    return offsets, exist


@triton.jit
def tile_of_program(
    positions,
    channels,
    rows,
    cols,
    padded,
    groups,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A program's tile: its column of tiles, its first position, its channels, and its `places`."""
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    group, first = (tl.program_id(0) % groups).to(index), (tl.program_id(0) // groups).to(index) * BLOCK_M
    c = group * BLOCK_C + tl.arange(0, BLOCK_C)
    offsets, exist = places(first + tl.arange(0, BLOCK_M), c, positions, channels, rows, cols, padded, CHANNELS_LAST)
    return group, first, c, offsets, exist


@triton.jit
def gate_places(
    first,
    group,
    positions,
    channels,
    rows,
    padded,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The offsets of the bytes of a tile's gate, each shared by 8 elements, and which of them exist."""
    if CHANNELS_LAST:
        q, c = first + tl.arange(0, BLOCK_M), group * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
        return places(q, c, positions, (channels + 7) // 8, 1, 1, 1, True)
    else:
        q, c = first // 8 + tl.arange(0, BLOCK_M // 8), group * BLOCK_C + tl.arange(0, BLOCK_C)
        return places(q, c, positions // 8, channels, rows, padded // 8, padded // 8, False)


@triton.jit
def packed(passes, CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """The bytes of a gate, from a tile of its bits."""
    bits = passes.to(tl.int32)
    weights = tl.arange(0, 8)
    if CHANNELS_LAST:
        return tl.sum(tl.reshape(bits, [BLOCK_M, BLOCK_C // 8, 8]) << weights[None, None, :], 2)
    else:
        return tl.sum(tl.reshape(bits, [BLOCK_M // 8, 8, BLOCK_C]) << weights[None, :, None], 1)


@triton.jit
def unpacked(bytes, CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """The bits of a gate as a tile."""
    weights = tl.arange(0, 8)
    if CHANNELS_LAST:
        bits = bytes.to(tl.int32)[:, :, None] >> weights[None, None, :]
    else:
        bits = bytes.to(tl.int32)[:, None, :] >> weights[None, :, None]
    return tl.reshape(bits & 1, [BLOCK_M, BLOCK_C]) != 0


@triton.jit
def gated_gradient(
    grad,
    gate,
    offsets,
    exist,
    first,
    group,
    positions,
    channels,
    rows,
    padded,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A tile of the gated gradient, in the dtype of `grad`."""
    g = tl.load(grad + offsets, exist, 0)
    if gate is not None:
        at, are = gate_places(first, group, positions, channels, rows, padded, CHANNELS_LAST, BLOCK_M, BLOCK_C)
        g = tl.where(unpacked(tl.load(gate + at, are, 0), CHANNELS_LAST, BLOCK_M, BLOCK_C), g, 0)
    return g
