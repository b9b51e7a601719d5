"""Stride, padding and dilation of a convolution: read from the caller's arguments, and checked against the input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from sparse_adv.argument_types import shortened
from sparse_adv.kernels.layout import output_size
from sparse_adv.ops.arguments import Pair, check_floating, read_pair


class Geometry(NamedTuple):
    """Each as (rows, columns)."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]


def read_geometry(
    filter: Sequence[int],
    stride: Pair | Sequence[int],
    padding: Pair | Sequence[int] | str,
    dilation: Pair | Sequence[int],
) -> Geometry:
    """Complete stride, padding and dilation to pairs, and "same" and "valid" to numbers.

    Args:
        filter: rows and columns of the filter.
        stride, padding, dilation: as in `torch.nn.functional.conv2d`.

    Raises:
        TypeError: if one is of another type.
        ValueError: if one is not one or two integers, is too small, or "same" padding would differ between two sides.
    """
    strides, dilations = read_pair("stride", stride), read_pair("dilation", dilation)
    geometry = Geometry(strides, read_padding(padding, filter, strides, dilations), dilations)
    if min(strides) < 1 or min(dilations) < 1 or min(geometry.padding) < 0:
        raise ValueError(
            f"stride and dilation must be positive and padding not negative, got {strides}, {dilations}, "
            f"{geometry.padding}"
        )
    return geometry


def geometry_of(conv: nn.Conv2d) -> Geometry:
    """Return the geometry of a layer; its attributes may be integers if code has set them after construction."""
    return read_geometry(conv.kernel_size, conv.stride, conv.padding, conv.dilation)


def pads_evenly(conv: nn.Conv2d) -> bool:
    """Return whether a layer pads with zeros, as many before the image as behind it."""
    try:
        geometry_of(conv)
    except ValueError:  # padding="same" with an even filter
        return False
    return conv.padding_mode == "zeros"


def check_input(input: Tensor, weight: Sequence[int], groups: int, geometry: Geometry) -> tuple[int, int, int, int]:
    """Check that an input fits a weight of this shape.

    Returns:
        The shape of the output, (N, K, P, Q).

    Raises:
        TypeError: if the input is not a dense floating tensor.
        ValueError: if it is not [N, C, H, W], has another number of channels or no pixels, or is smaller than the
            filter.
    """
    check_floating("input", input)
    if input.dim() != 4:
        raise ValueError(f"input must be [N, C, H, W], got shape {tuple(input.shape)}")
    if input.shape[1] != weight[1] * groups:
        raise ValueError(
            f"input has {input.shape[1]} channels, weight of shape {tuple(weight)} with groups={groups} needs "
            f"{weight[1] * groups}"
        )
    if 0 in input.shape[2:] and input.shape[0] > 0:  # as PyTorch does
        raise ValueError(f"input must have pixels, got shape {tuple(input.shape)}")
    rows, cols = output_size(input.shape[2:], weight[2:], *geometry)
    if rows < 1 or cols < 1:
        raise ValueError(
            f"input of {input.shape[2]} x {input.shape[3]} pixels with padding {geometry.padding} is smaller than the "
            f"filter {tuple(weight[2:])} with dilation {geometry.dilation}"
        )
    return input.shape[0], weight[0], rows, cols


def read_padding(
    padding: Pair | Sequence[int] | str,
    filter: Sequence[int],
    stride: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
) -> tuple[int, int]:
    """Complete the padding to a pair, and "same" and "valid" to numbers; raises ValueError where that is impossible."""
    if not isinstance(padding, str):
        return read_pair("padding", padding)
    if padding == "valid":
        return (0, 0)
    if padding == "same":
        if stride != (1, 1):
            raise ValueError(f'padding="same" needs stride 1, got stride {stride}')
        total = [d * (size - 1) for d, size in zip(dilation, filter, strict=True)]
        if any(t % 2 for t in total):
            raise ValueError(
                f'padding="same" with filter {tuple(filter)} and dilation {dilation} is not the same on both '
                "sides: pad the input with torch.nn.functional.pad first"
            )
        return (total[0] // 2, total[1] // 2)
    raise ValueError(f'padding must be one or two integers, "same" or "valid", got {shortened(padding)}')
