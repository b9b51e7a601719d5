"""The end of the block-sparse convolution: what a program does to its sums before it writes them."""

from __future__ import annotations

import triton
import triton.language as tl

from sparse_adv.kernels.gate_tiles import packed, unpacked


@triton.jit
def store_with_epilogue(
    y,  # float32 [PIXELS, WRITTEN], the sums
    pixel_at,  # int64 [PIXELS], where each pixel is in the output
    exist,  # [PIXELS], whether it is inside of the output
    first_channel,  # of the tile; if it is not marked as a multiple of WRITTEN, stores are narrow and registers spill
    out_channels,
    channel_step,
    output,  # this and the next five as in `convolve_kernel`
    scale,
    bias,
    residual,
    gate,
    gate_out,
    RELU: tl.constexpr,
    PIXELS: tl.constexpr,
    WRITTEN: tl.constexpr,
):
    """Write a tile of the output, and the bits of its gate."""
    k = first_channel + tl.arange(0, WRITTEN)
    valid = k < out_channels
    at = pixel_at[:, None] + (k.to(tl.int64) * channel_step)[None, :]
    mask = exist[:, None] & valid[None, :]
    # The bytes of the bits. In a gate of bits, the channels of a pixel lie next to each other.
    byte = first_channel // 8 + tl.arange(0, WRITTEN // 8)
    bytes_at = (pixel_at // 8)[:, None] + byte[None, :]
    bytes_mask = exist[:, None] & (byte * 8 < out_channels)[None, :]
    if scale is not None:
        y *= tl.load(scale + k, mask=valid, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        y += tl.load(bias + k, mask=valid, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        y += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        y = tl.where(y < 0, 0.0, y)  # NaN stays
    if gate is not None:
        if gate.dtype.element_ty == tl.uint8:
            y = tl.where(unpacked(tl.load(gate + bytes_at, mask=bytes_mask, other=0), True, PIXELS, WRITTEN), y, 0.0)
        else:
            y = tl.where(tl.load(gate + at, mask=mask, other=0.0) <= 0, 0.0, y)
    result = y.to(output.dtype.element_ty)
    if gate_out is not None:
        bits = packed((result > 0) | (result != result), True, PIXELS, WRITTEN)  # NaN passes
        tl.store(gate_out + bytes_at, bits.to(tl.uint8), mask=bytes_mask)
    tl.store(output + at, result, mask=mask)
