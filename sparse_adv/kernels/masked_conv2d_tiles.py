"""Tiles of pixels: their size for each kind of product, and each pixel's position in the image."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from sparse_adv.kernels.layout import MAX_PIXELS


@dataclass(frozen=True)
class Tile:
    """The pixels that one program computes at a time, and Triton's options."""

    pixels: int
    num_warps: int
    num_stages: int
    """Loads that are in flight at a time."""

    @property
    def options(self) -> dict[str, int]:
        """The keyword arguments for Triton."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


# Programs that an H100 or H200, for which the tiles were chosen, runs at a time: two on each of 132 multiprocessors.
_PROGRAMS = 264

# By kind of product and output channels of the tile: the tiles for layers that fill the GPU, and for other layers.
# Three programs with the 16-bit tiles fit on a multiprocessor of 227 KB and 64 K registers, so that one computes while
# another waits for its lists, its first pixels or its epilogue.
_CONVOLUTION = {
    ("16-bit", 64): (Tile(128, 4, 3), Tile(64, 4, 4)),
    ("16-bit", 32): (Tile(256, 4, 3), Tile(64, 4, 4)),
    ("tf32", 64): (Tile(128, 8, 2), Tile(64, 4, 3)),
    ("tf32", 32): (Tile(128, 4, 3), Tile(64, 4, 3)),
    ("tf32x3", 64): (Tile(64, 4, 2), Tile(64, 4, 2)),
    ("tf32x3", 32): (Tile(64, 4, 2), Tile(64, 4, 2)),
}


# By kind of product: the tile of the weight gradient.
_GRADIENT = {"16-bit": Tile(64, 4, 4), "tf32": Tile(32, 4, 4), "tf32x3": Tile(32, 4, 2)}


def kind_of(operand: Tensor, precision: str) -> str:
    """The kind of product: "16-bit", or for float32 the precision, "tf32" or "tf32x3"."""
    return "16-bit" if operand.element_size() == 2 else precision


def convolution_tile(kind: str, channels: int, pixels: int, lists: int) -> Tile:
    """The tile for the product of `pixels` pixels and `lists` lists of `channels` output channels each."""
    large, small = _CONVOLUTION[kind, channels]
    fills_gpu = triton.cdiv(pixels, large.pixels) * lists >= _PROGRAMS
    return large if fills_gpu else small


def gradient_tile(kind: str) -> Tile:
    """The tile of pixels that a program of the weight gradient sums at a time."""
    return _GRADIENT[kind]


def gradient_shares(pixels: int, live: int, tile: Tile) -> int:
    """The number of shares of the pixels with which `live` blocks fill the GPU twice; a share has 8 tiles or more."""
    return max(min(triton.cdiv(2 * _PROGRAMS, live), pixels // (8 * tile.pixels)), 1)


def check_pixels(pixels: int) -> int:
    """Return the number of pixels; raises ValueError if the kernels cannot number that many."""
    if pixels >= MAX_PIXELS:
        raise ValueError(
            f"block kernels take fewer than {MAX_PIXELS} pixels in all images of a batch together, got {pixels}"
        )
    return pixels


def divider(divisor: int) -> tuple[int, int]:
    """The factor and the shift with which `quotient` divides by a divisor, 1 <= divisor < 2**31.

    Source: Granlund and Montgomery, "Division by invariant integers using multiplication" (PLDI 1994), figure 4.1.
    """
    shift = (divisor - 1).bit_length()
    factor = (((1 << shift) - divisor) << 32) // divisor + 1
    return factor - (factor >> 31 << 32), shift


@triton.jit
def quotient(number, factor, shift):
    """number // divisor for 0 <= number < 2**31: three instructions instead of some thirty."""
    number = number.to(tl.uint32)
    return ((tl.umulhi(number, factor.to(tl.uint32, bitcast=True)) + number) >> shift).to(tl.int32)
