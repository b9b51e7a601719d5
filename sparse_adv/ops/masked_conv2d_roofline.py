"""A roofline model that says whether a pass over live blocks is faster than the dense convolution on a GPU.

Forward and grad_input take the longest of three times: to move their tensors, to multiply, and the minimum time of a
kernel. Block kernels save only multiplications, so no mask speeds up a layer whose dense pass is bound by memory.

grad_weight reads a live block's channels of the input and of the output gradient, mostly from the L2 cache. Several
programs share the pixels of a block, and their sums are added at the end. Its constants are fitted to the rows of an
H200 in bfloat16 (`benchmarks/results/gpu_h200.json`), those of forward and grad_input to the rows of an H100
(`gpu_h100.json`). On neither does the model choose a block kernel that was more than 2 % slower than cuDNN. These are
estimates; `nn.tune` measures.
"""

from __future__ import annotations

import math
from typing import NamedTuple

# On an H200 in bfloat16: 790 TFLOP/s (a large matrix product) over 4.3 TB/s (a copy). An A100 has 82, an H100 128.
_MACS_PER_BYTE = 92
_LATENCY_BYTES = 13e6  # bytes that the memory moves in 3 us, the minimum time of a kernel

_DENSE_EFFICIENCY = 0.6  # of the multiplication rate: cuDNN at these shapes
_BLOCK_EFFICIENCY = 0.39  # of the block kernels
_MEMORY_EFFICIENCY = 0.8
_MARGIN = 0.9  # the block kernels are taken if they are expected to need less than this share of the dense time

# grad_weight on an H200; times in microseconds. The model is within 30 % of each row's.
_GRADIENT_LATENCY = 10.0
_DENSE_MACS = 410e6  # MACs that cuDNN executes in a microsecond
_DENSE_TILE = 128  # channels that cuDNN multiplies at a time: 64 cost as much as 128, on one of the two sides
_BYTES_MOVED = 3.0e6  # bytes read from memory in a microsecond
_BYTES_READ = {32: 3.9e6, 64: 5.0e6}  # the same, mostly from the L2 cache, for each length of a block's longer side
_PROGRAMS = 528  # programs that share the pixels of all blocks, if there are enough pixels
_SHARE_PIXELS = 512  # least number of pixels of one program
_SHARE = 0.04  # time to add the share of one program for a block of 64 x 64 weights


class PassSizes(NamedTuple):
    """The sizes that decide how much one pass of a convolution moves and multiplies."""

    images: int
    in_elements: int
    """Elements of one input image."""
    out_elements: int
    """Elements of one output image."""
    out_pixels: int
    """Pixels of one output image."""
    weights: int
    nonzeros: int
    """The number of weights that the mask keeps."""
    element_bytes: int
    channels: tuple[int, int]
    """Output channels, and input channels of one group."""
    block: tuple[int, int]
    """Output and input channels of a block of the mask."""


def blocks_are_faster(cost: PassSizes, gradient_of_weight: bool = False) -> bool:
    """Whether the pass over live blocks is expected to take less than 0.9 of the dense convolution's time.

    Examples:
        >>> def conv3x3(channels, pixels, density):
        ...     weights, elements, pair = 9 * channels**2, channels * pixels, (channels, channels)
        ...     return PassSizes(512, elements, elements, pixels, weights, int(density * weights), 2, pair, (64, 64))
        >>> blocks_are_faster(conv3x3(512, 16, 0.1)), blocks_are_faster(conv3x3(512, 16, 0.9))
        (True, False)
    """
    if gradient_of_weight:
        return _gradient_of_blocks(cost) < _MARGIN * _dense_gradient(cost)
    dense = _time(cost, cost.weights, _DENSE_EFFICIENCY)
    blocks = _time(cost, cost.nonzeros, _BLOCK_EFFICIENCY)
    return blocks < _MARGIN * dense


def _moved(cost: PassSizes) -> int:
    """Bytes of the input and output images, and of all weights of the dense convolution."""
    return cost.element_bytes * (cost.images * (cost.in_elements + cost.out_elements) + cost.weights)


def _time(cost: PassSizes, weights: int, efficiency: float) -> float:
    """The time of a pass that multiplies this many weights, as the number of bytes that the memory moves meanwhile."""
    moved = _moved(cost) - cost.element_bytes * (cost.weights - weights)
    # float32 operands are multiplied as tf32, at half the rate.
    multiplied = cost.images * cost.out_pixels * weights / _MACS_PER_BYTE * (cost.element_bytes / 2)
    return max(_LATENCY_BYTES, moved / _MEMORY_EFFICIENCY, multiplied / efficiency)


def _dense_gradient(cost: PassSizes) -> float:
    padding = min(2.0, max(1.0, _DENSE_TILE / min(cost.channels)))
    for channels in cost.channels:
        if channels > _DENSE_TILE:
            padding *= math.ceil(channels / _DENSE_TILE) * _DENSE_TILE / channels
    macs = cost.images * cost.out_pixels * cost.weights * padding * (cost.element_bytes / 2)
    return _GRADIENT_LATENCY + macs / _DENSE_MACS


def _gradient_of_blocks(cost: PassSizes) -> float:
    out, into = cost.block
    live, pixels = max(1.0, cost.nonzeros / (out * into)), cost.images * cost.out_pixels
    read = live * pixels * (out + into) * cost.element_bytes / _BYTES_READ[max(out, into)]
    shares = max(1.0, min(_PROGRAMS / live, pixels / _SHARE_PIXELS))
    return _GRADIENT_LATENCY + _SHARE * shares * (out * into / 64**2) + max(_moved(cost) / _BYTES_MOVED, read)
