"""Tiles of pixels: how large for which product, and where in an image each pixel lies."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """How one program computes: so many pixels at a time, by so many warps, so many loads ahead."""

    pixels: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


# A GPU of the class that the tiles are made for runs this many programs at a time: two for each of 132 multiprocessors.
_PROGRAMS = 264

# By kind of product and output channels of the tile: for layers that fill the GPU, and for those that do not.
# The 16-bit ones leave room for three programs on a multiprocessor of 227 KB and 64 K registers, as one alone
# waits for its lists, its first pixels and its epilogue.
_CONVOLUTION = {
    ("16-bit", 64): (Tile(128, 4, 3), Tile(64, 4, 4)),
    ("16-bit", 32): (Tile(256, 4, 3), Tile(64, 4, 4)),
    ("tf32", 64): (Tile(128, 8, 2), Tile(64, 4, 3)),
    ("tf32", 32): (Tile(128, 4, 3), Tile(64, 4, 3)),
    ("tf32x3", 64): (Tile(64, 4, 2), Tile(64, 4, 2)),
    ("tf32x3", 32): (Tile(64, 4, 2), Tile(64, 4, 2)),
}


# By kind of product: pixels that are summed at a time.
_GRADIENT = {"16-bit": Tile(64, 4, 4), "tf32": Tile(32, 4, 4), "tf32x3": Tile(32, 4, 2)}


def kind_of(operand: Tensor, precision: str) -> str:
    """The unit that multiplies: "16-bit", or for float32 the precision asked for, "tf32" or "tf32x3"."""
    return "16-bit" if operand.element_size() == 2 else precision


def convolution_tile(kind: str, channels: int, pixels: int, lists: int, changed: bool) -> Tile:
    """The tile for the product of `pixels` pixels and `lists` lists of `channels` output channels each."""
    large, small = _CONVOLUTION[kind, channels]
    fills = triton.cdiv(pixels, large.pixels) * lists >= _PROGRAMS
    return large if fills and not changed else small


def gradient_tile(kind: str) -> Tile:
    """The tile of pixels that a program of the weight gradient sums at a time."""
    return _GRADIENT[kind]


def gradient_shares(pixels: int, live: int, tile: Tile) -> int:
    """Into how many shares the pixels go, so that `live` blocks fill the GPU twice, each share eight tiles or more."""
    return max(min(triton.cdiv(2 * _PROGRAMS, live), pixels // (8 * tile.pixels)), 1)


def check_size(pixels: int) -> int:
    """The number, or ValueError if there are more pixels than the kernels can number."""
    if pixels >= 2**30:
        raise ValueError(f"block kernels take fewer than 2**30 pixels in all images of a batch together, got {pixels}")
    return pixels


def divider(divisor: int) -> tuple[int, int]:
    """What `quotient` needs instead of the divisor, 1 <= divisor < 2**31.

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
