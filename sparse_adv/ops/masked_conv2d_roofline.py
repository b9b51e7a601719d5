"""When a pass over live blocks is expected to beat the dense convolution on a GPU: a roofline, not a measurement.

A pass takes the longest of three times: to move its tensors, to multiply, and to be launched at all. Block kernels save
multiplications only, so a layer whose dense pass is bound by memory gains nothing from any mask. `nn.tune` measures.
"""

from __future__ import annotations

from typing import NamedTuple

# Of an H200 in bfloat16: 790 TFLOP/s of a large matrix product over 4.3 TB/s of a copy. An A100 has 82, an H100 128.
_MULTIPLY_ADDS_PER_BYTE = 92
_LATENCY_BYTES = 13e6  # what the memory moves in the 3 us below which no kernel gets

_DENSE_EFFICIENCY = 0.6  # of the multiplication rate, as cuDNN reaches it at these shapes
_BLOCK_EFFICIENCY = {False: 0.39, True: 0.3}  # of the block kernels: forward and grad_input, grad_weight
_MEMORY_EFFICIENCY = 0.8
_MARGIN = 0.9  # of the dense time: what is expected must be better than this to be taken


class Pass(NamedTuple):
    """What one pass of a convolution moves and multiplies."""

    images: int
    in_elements: int
    """Of one image; `out_elements` and `out_pixels` likewise."""
    out_elements: int
    out_pixels: int
    weights: int
    kept: int
    element_bytes: int


def blocks_are_faster(work: Pass, gradient_of_weight: bool = False) -> bool:
    """Whether the time over live blocks is expected to be less than 0.9 of the dense convolution's."""
    dense = _time(work, work.weights, _DENSE_EFFICIENCY)
    blocks = _time(work, work.kept, _BLOCK_EFFICIENCY[gradient_of_weight])
    return blocks < _MARGIN * dense


def _time(work: Pass, weights: int, efficiency: float) -> float:
    """In bytes that the memory could move meanwhile."""
    moved = work.element_bytes * (work.images * (work.in_elements + work.out_elements) + weights)
    # float32 operands are multiplied as tf32, at half the rate.
    multiplied = work.images * work.out_pixels * weights / _MULTIPLY_ADDS_PER_BYTE * (work.element_bytes / 2)
    return max(_LATENCY_BYTES, moved / _MEMORY_EFFICIENCY, multiplied / efficiency)
