"""BatchNorm with the statistics of the batch, residual and ReLU in Triton, and its gradient.

Each direction is three kernels: one that writes partial sums of some rows; a small one that adds these up in float64,
in a fixed order and without atomics; and one that reads the images again and writes the result. All work on tiles
[positions, channels]. channels_last images are such a matrix in memory. A tile of NCHW images has one channel, and its
positions are the pixels of all images. With a gate, rows are padded to a multiple of 8 positions, because a gate has
whole bytes in each row of the innermost dimension.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_adv.kernels.gate_tiles import (
    gate_places,
    gated_gradient,
    packed,
    places,
    tile_of_program,
)
from sparse_adv.kernels.layout import WIDE_FROM, layout_of

# Chosen; none is tuned on a GPU yet.
_TILE = 4096  # elements: with 8 warps each thread loads 16 bytes of each 16-bit tensor twice
_OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
_BYTES_IN_ROW = 128  # of a tile of channels_last images: a cache line
_SUMMED = 8192  # least number of elements that a program sums
_PROGRAMS = 512  # for sums of large images: a large GPU runs all of them at once, and their partial sums are few
_ADDENDS = 256  # that a thread adds in the dtype of the arithmetic; then the sums continue in float64
_ADDED = {"BLOCK_C": 8, "BLOCK_SPLITS": 256}  # channels and programs whose partial sums form a tile


class _Tiles(NamedTuple):
    """How images are divided into tiles; the kernels have arguments of these names."""

    positions: int
    """Positions of one channel, with padding."""
    channels: int
    rows: int
    """Rows of one NCHW image; 1 if no row needs padding for the gate, so that an image is one long row."""
    cols: int
    padded: int
    """Positions of a row."""
    groups: int
    """Number of tiles next to each other."""
    CHANNELS_LAST: bool
    WIDE: bool
    """Whether offsets need 64 bits."""
    BLOCK_M: int
    BLOCK_C: int

    @property
    def span(self) -> int:
        """Positions of each channel that one program sums."""
        programs = max(1, min(_PROGRAMS, self.positions * self.channels // _SUMMED) // self.groups)
        tiles = triton.cdiv(triton.cdiv(self.positions, programs), self.BLOCK_M)
        return min(tiles, _ADDENDS) * self.BLOCK_M

    def programs(self, span: int) -> tuple[int]:
        """The grid if each program has this many positions."""
        return (self.groups * triton.cdiv(self.positions, span),)


def _tiles_of(images: Tensor, gate: Tensor | None) -> _Tiles:
    batch, channels, rows, cols = images.shape
    channels_last = layout_of(images) == torch.channels_last
    if channels_last:
        positions, rows, cols, padded = batch * rows * cols, 1, 1, 1
        # With the greatest power of 2 that divides the channels, no lane is idle.
        block_c = max(16, min(_BYTES_IN_ROW // images.element_size(), channels & -channels))
    else:
        if gate is None or cols % 8 == 0:
            rows, cols = 1, rows * cols
        padded = cols if gate is None else triton.cdiv(cols, 8) * 8
        positions, block_c = batch * rows * padded, 1
    wide = (positions + _TILE) * (channels + block_c) >= WIDE_FROM  # the last tile may reach beyond the images
    shape = positions, channels, rows, cols, padded
    return _Tiles(*shape, triton.cdiv(channels, block_c), channels_last, wide, _TILE // block_c, block_c)


def forward(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out: Tensor,
    mean: Tensor,
    var: Tensor,
    gate: Tensor | None,
) -> None:
    """act((input - mean) / sqrt(var + eps) * weight + bias + residual), with the statistics and the gate of the ReLU.

    Args:
        input: float tensor [N, C, H, W] without gaps, NCHW or channels_last, not empty.
        residual: tensor like input, or None.
        weight, bias: float tensors [C] without gaps, or None.
        eps: added to the variance.
        out: tensor like input that is written.
        mean, var: tensors [C] in the dtype of the arithmetic that are written; the variance is biased.
        gate: uint8 tensor that is written, laid out as `ops.empty_gate` says; None for no ReLU.
    """
    tiles = _tiles_of(input, gate)
    channels, share = input.shape[1], input.shape[1] / input.numel()
    step = 1 if tiles.CHANNELS_LAST else math.prod(input.shape[2:])
    with torch.cuda.device_of(input):
        partial = _partial_sums(tiles, input, None, None, None, mean.dtype)
        statistics_kernel[(triton.cdiv(channels, _ADDED["BLOCK_C"]),)](
            partial, input, mean, var, len(partial), channels, step, share, **_ADDED
        )
        forward_kernel[tiles.programs(tiles.BLOCK_M)](
            *(input, residual, weight, bias, mean, var, eps, out, gate), **tiles._asdict(), **_OPTIONS
        )


def backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    gate: Tensor | None,
    eps: float,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_residual: Tensor | None,
) -> None:
    """The gradients of `forward`.

    Args:
        grad: tensor like input.
        input, weight, mean, var, gate, eps: as in `forward`.
        grad_input: tensor like input that is written.
        grad_weight, grad_bias: tensors like mean that are written.
        grad_residual: tensor like input that receives the gated gradient, or None.
    """
    tiles = _tiles_of(input, gate)
    channels, share = input.shape[1], input.shape[1] / input.numel()
    with torch.cuda.device_of(input):
        partial = _partial_sums(tiles, input, grad, gate, mean, mean.dtype)
        grad_vectors_kernel[(triton.cdiv(channels, _ADDED["BLOCK_C"]),)](
            partial, var, grad_weight, grad_bias, len(partial), channels, eps, **_ADDED
        )
        vectors = weight, mean, var, grad_weight, grad_bias
        backward_kernel[tiles.programs(tiles.BLOCK_M)](
            *(grad, input, gate, *vectors, eps, share, grad_input, grad_residual),
            **tiles._asdict(),
            **_OPTIONS,
        )


def _partial_sums(
    tiles: _Tiles, input: Tensor, grad: Tensor | None, gate: Tensor | None, mean: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Sums [programs, 2, C]: of g and of g * (input - mean), where g is the gradient; see `sums_kernel`."""
    span = tiles.span
    partial = input.new_empty(triton.cdiv(tiles.positions, span), 2, tiles.channels, dtype=dtype)
    sums_kernel[tiles.programs(span)](input, grad, gate, mean, partial, span, **tiles._asdict(), **_OPTIONS)
    return partial


@triton.jit
def sums_kernel(
    input,
    grad,  # as input, or None for input - mean
    gate,  # bytes, or None
    mean,  # [channels], or None for the first value of each channel, so that the squares do not cancel
    partial,  # [programs, 2, channels]
    span,
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
    """Sums of g and of g * (input - mean) over `span` positions, where g is the gated gradient."""
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    accumulate: tl.constexpr = partial.dtype.element_ty
    group, split = (tl.program_id(0) % groups).to(index), (tl.program_id(0) // groups).to(index)
    c = group * BLOCK_C + tl.arange(0, BLOCK_C)
    if mean is None:
        shift = tl.load(input + (c if CHANNELS_LAST else c * rows * cols), c < channels, 0).to(accumulate)
    else:
        shift = tl.load(mean + c, c < channels, 0)
    firsts = tl.zeros([BLOCK_M, BLOCK_C], accumulate)
    seconds = tl.zeros([BLOCK_M, BLOCK_C], accumulate)
    begin = split * span
    for first in range(begin, tl.minimum(begin + span, positions), BLOCK_M):
        q = first + tl.arange(0, BLOCK_M)
        offsets, exist = places(q, c, positions, channels, rows, cols, padded, CHANNELS_LAST)
        d = tl.load(input + offsets, exist, 0).to(accumulate) - shift[None, :]
        if grad is None:
            g = tl.where(exist, d, 0)
        else:
            g = gated_gradient(
                *(grad, gate, offsets, exist, first, group, positions, channels, rows, padded),
                CHANNELS_LAST,
                BLOCK_M,
                BLOCK_C,
            ).to(accumulate)
        firsts += g
        seconds += g * d
    to = partial + split * 2 * channels + c
    tl.store(to, tl.sum(firsts, 0), c < channels)
    tl.store(to + channels, tl.sum(seconds, 0), c < channels)


@triton.jit
def added_partials(partial, c, splits, channels, BLOCK_C: tl.constexpr, BLOCK_SPLITS: tl.constexpr):
    """The two sums of each channel, in float64."""
    firsts = tl.zeros([BLOCK_SPLITS, BLOCK_C], tl.float64)
    seconds = tl.zeros([BLOCK_SPLITS, BLOCK_C], tl.float64)
    for first in range(0, splits, BLOCK_SPLITS):
        split = first + tl.arange(0, BLOCK_SPLITS)
        at = partial + split[:, None] * 2 * channels + c[None, :]
        exist = (split < splits)[:, None] & (c < channels)[None, :]
        firsts += tl.load(at, exist, 0).to(tl.float64)
        seconds += tl.load(at + channels, exist, 0).to(tl.float64)
    return tl.sum(firsts, 0), tl.sum(seconds, 0)


@triton.jit
def statistics_kernel(
    partial,  # [splits, 2, channels], sums of the input and its square, shifted
    input,
    mean,  # [channels], and so is var
    var,
    splits,
    channels,
    step,  # from a channel's first value to the next one's
    share: tl.float64,  # of an element in a mean
    BLOCK_C: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """Mean and biased variance of a few channels."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    first, second = added_partials(partial, c, splits, channels, BLOCK_C, BLOCK_SPLITS)
    shift = tl.load(input + c.to(tl.int64) * step, c < channels, 0).to(tl.float64)
    from_shift = first * share
    variance = second * share - from_shift * from_shift
    tl.store(mean + c, (shift + from_shift).to(mean.dtype.element_ty), c < channels)
    tl.store(var + c, tl.where(variance < 0, 0, variance).to(var.dtype.element_ty), c < channels)  # NaN stays


@triton.jit
def grad_vectors_kernel(
    partial,  # [splits, 2, channels], sums of the gradient and of its product with input - mean
    var,  # [channels], and so are the gradients
    grad_weight,
    grad_bias,
    splits,
    channels,
    eps: tl.float64,
    BLOCK_C: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """The gradients of weight and bias of a few channels."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    first, second = added_partials(partial, c, splits, channels, BLOCK_C, BLOCK_SPLITS)
    deviation = tl.sqrt(tl.load(var + c, c < channels, 1).to(tl.float64) + eps)
    tl.store(grad_weight + c, (second / deviation).to(grad_weight.dtype.element_ty), c < channels)
    tl.store(grad_bias + c, first.to(grad_bias.dtype.element_ty), c < channels)


@triton.jit
def factor_of(weight, var, c, channels, eps):
    """1 / deviation, and the factor of a channel, which is its weight times that."""
    inverse = tl.rsqrt(tl.load(var + c, c < channels, 1) + tl.full((), eps, var.dtype.element_ty))
    factor = inverse
    if weight is not None:
        factor = inverse * tl.load(weight + c, c < channels, 0).to(inverse.dtype)
    return inverse, factor


@triton.jit
def forward_kernel(
    input,
    residual,  # as input, or None
    weight,  # [channels] or None, and so is bias
    bias,
    mean,  # [channels], and so is var
    var,
    eps: tl.float64,
    out,
    gate,  # bytes, or None for no ReLU
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
    """A tile of the result, and its gate."""
    accumulate: tl.constexpr = mean.dtype.element_ty
    group, first, c, offsets, exist = tile_of_program(
        positions, channels, rows, cols, padded, groups, CHANNELS_LAST, WIDE, BLOCK_M, BLOCK_C
    )
    y = tl.load(input + offsets, exist, 0).to(accumulate) - tl.load(mean + c, c < channels, 0)[None, :]
    _, factor = factor_of(weight, var, c, channels, eps)
    y *= factor[None, :]
    if bias is not None:
        y += tl.load(bias + c, c < channels, 0).to(accumulate)[None, :]
    if residual is not None:
        y += tl.load(residual + offsets, exist, 0).to(accumulate)
    if gate is not None:
        passes = (y > 0) | (y != y)  # NaN passes
        y = tl.where(passes, y, 0)
        at, are = gate_places(first, group, positions, channels, rows, padded, CHANNELS_LAST, BLOCK_M, BLOCK_C)
        bytes = packed(passes & exist, CHANNELS_LAST, BLOCK_M, BLOCK_C)
        tl.store(gate + at, bytes.to(tl.uint8), are)
    tl.store(out + offsets, y.to(out.dtype.element_ty), exist)


@triton.jit
def backward_kernel(
    grad,
    input,
    gate,  # bytes, or None
    weight,  # [channels], or None
    mean,  # [channels], and so are the next three
    var,
    grad_weight,
    grad_bias,
    eps: tl.float64,
    share: tl.float64,  # of an element in a mean
    grad_input,
    grad_residual,  # as input, or None
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
    """A tile of factor * (g - mean of g - xhat * mean of g * xhat), where xhat is the normalised input."""
    accumulate: tl.constexpr = mean.dtype.element_ty
    group, first, c, offsets, exist = tile_of_program(
        positions, channels, rows, cols, padded, groups, CHANNELS_LAST, WIDE, BLOCK_M, BLOCK_C
    )
    d = tl.load(input + offsets, exist, 0).to(accumulate) - tl.load(mean + c, c < channels, 0)[None, :]
    g = gated_gradient(
        *(grad, gate, offsets, exist, first, group, positions, channels, rows, padded), CHANNELS_LAST, BLOCK_M, BLOCK_C
    )
    if grad_residual is not None:
        tl.store(grad_residual + offsets, g, exist)
    inverse, factor = factor_of(weight, var, c, channels, eps)
    part = tl.full((), share, accumulate)
    slope = tl.load(grad_weight + c, c < channels, 0) * inverse * part
    offset = tl.load(grad_bias + c, c < channels, 0) * part
    of_input = (g.to(accumulate) - offset[None, :] - d * slope[None, :]) * factor[None, :]
    tl.store(grad_input + offsets, of_input.to(grad_input.dtype.element_ty), exist)
