"""A roofline model that says whether a pass over live blocks is faster than the dense convolution on a GPU.

A pass takes the longest of three times: to move its tensors, to multiply, and the minimum time of a kernel. Block
kernels save multiplications only, so no mask makes a layer faster whose dense pass is bound by memory. These are
estimates; `nn.tune` measures.
"""

from __future__ import annotations

from typing import NamedTuple

# Of an H200 in bfloat16: 790 TFLOP/s of a large matrix product over 4.3 TB/s of a copy. An A100 has 82, an H100 128.
_MACS_PER_BYTE = 92
_LATENCY_BYTES = 13e6  # bytes that the memory moves in 3 us, the minimum time of a kernel

_DENSE_EFFICIENCY = 0.6  # of the multiplication rate: cuDNN at these shapes
_BLOCK_EFFICIENCY = {False: 0.39, True: 0.3}  # of the block kernels: forward and grad_input, grad_weight
_MEMORY_EFFICIENCY = 0.8
_MARGIN = 0.9  # the block kernels are taken if they are expected to need less than this share of the dense time


class Pass(NamedTuple):
    """The sizes of one pass of a convolution that decide how much it moves and multiplies."""

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


def blocks_are_faster(cost: Pass, gradient_of_weight: bool = False) -> bool:
    """Whether the pass over live blocks is expected to take less than 0.9 of the dense convolution's time.

    Examples:
        >>> def conv3x3(channels, pixels, density):
        ...     weights, elements = 9 * channels**2, channels * pixels
        ...     return Pass(512, elements, elements, pixels, weights, int(density * weights), element_bytes=2)
        >>> blocks_are_faster(conv3x3(512, 16, 0.1)), blocks_are_faster(conv3x3(512, 16, 0.9))
        (True, False)
    """
    dense = _time(cost, cost.weights, _DENSE_EFFICIENCY)
    blocks = _time(cost, cost.nonzeros, _BLOCK_EFFICIENCY[gradient_of_weight])
    return blocks < _MARGIN * dense


def _time(cost: Pass, weights: int, efficiency: float) -> float:
    """The time of a pass that multiplies so many weights, in bytes that the memory moves meanwhile."""
    moved = cost.element_bytes * (cost.images * (cost.in_elements + cost.out_elements) + weights)
    # float32 operands are multiplied as tf32, at half the rate.
    multiplied = cost.images * cost.out_pixels * weights / _MACS_PER_BYTE * (cost.element_bytes / 2)
    return max(_LATENCY_BYTES, moved / _MEMORY_EFFICIENCY, multiplied / efficiency)
