"""Which kernel computes a layer fastest on a CPU, and in which layout.

A masked layer has the direct sparse kernel, Winograd's filtering with the live filters alone (NCHW), or a dense one. A
dense layer has Winograd's filtering (channels_last) or oneDNN, which computes some layers faster in NCHW.

`benchmarks/winograd_thresholds.py` shows on any machine where each threshold lies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from sparse_adv.kernels.layout import output_size
from sparse_adv.nn import MaskedConv2d
from sparse_adv.ops.conv_geometry import geometry_of, pads_evenly

_LEAST_CHANNELS = 16
_LEAST_TILES = {2: 64, 4: 128}
"""Least tiles of a batch, rounded. By measurement, transforming the weights costs as much time as about 90 tiles of 4 x
4 pixels, or 110 of 2 x 2, save in one pass. So 128 tiles of 4 x 4 pay in every pass, even in training, where each pass
transforms the weights. 64 tiles of 2 x 2 pay from the second step of an attack on, because an attack transforms the
weights once for all steps."""

_SPARSE_UP_TO = ((4, 0.4), (2, 0.35), (1, 0.27))
"""Pairs: for blocks with at least this many output channels, the density up to which the sparse kernel is faster.
Measured on one gradient of 64 images, ResNet-18 of width 64, an Intel Xeon with AVX-512: blocks (1, 1) take 383 and 522
ms at densities 0.2 and 0.3, Winograd 480; blocks (2, 2) 421 and 517 at 0.3 and 0.4, Winograd 465; blocks (4, 4) 467 and
577 at 0.4 and 0.5, Winograd 470."""

_LIVE_UP_TO = ((4, 0.8), (2, 0.5), (1, 0.4))
"""Pairs: for blocks with at least this many output channels, the share of live filters up to which the sparse products
are faster than Winograd's dense ones. Measured as a fraction of the dense time on four layers of a ResNet-18, 64
images, an Intel Xeon with AVX-512: blocks of 4 take 0.7 to 0.8 at a share of 0.6 and 0.8 to 1.04 at 0.8; blocks of 2
take 0.6 to 0.9 at 0.4 and 0.8 to 1.3 at 0.6; blocks of 1 take 0.4 to 0.7 at 0.2 and 0.6 to 1.3 at 0.4. One gradient of
a ResNet-18 on a Zen 4: dense products take 1.20 and 1.10 times as long at 0.7 and 0.8 (blocks of 4), 1.14 and 1.01 at
0.5 and 0.6 (2), 1.30 and 1.12 at 0.4 and 0.5 (1)."""
_LEAST_KEPT_OF_LIVE = 2 / 3
"""Least share of their weights that live filters must keep: pruned weights in them are multiplied for nothing. With
single weights kept at density 0.4, filtering is 1.4 times as fast as the direct kernel with 64 and 128 channels, but
takes 1.3 times as long with 256 and 2.7 to 4 times as long with 512."""
_LEAST_CHANNELS_OF_LIVE_FILTERS = 32
_LEAST_CHANNELS_IN_NCHW = 256
_MOST_PIXELS_IN_NCHW = 36
_LEAST_IMAGES_IN_NCHW = 4
_LEAST_TILES_OF_LIVE_FILTERS = 32
_MOST_MULTIPLICATIONS = 0.8
"""As a share of a direct convolution's. Small images fill tiles badly: one of 2 x 2 pixels saves none."""


def sparse_is_faster(layer: MaskedConv2d, shape: Sequence[int]) -> bool:
    """Whether the direct sparse kernel is the fastest for a layer, also compared with dense ones in channels_last."""
    if layer.plan(layer.weight.new_empty(shape)).forward.kernel != "sparse":
        return False
    if layer.weight.dtype != torch.float32 or winograd_tile(layer, shape) is None:
        return True
    return layer.density <= next(density for channels, density in _SPARSE_UP_TO if layer.block[0] >= channels)


def takes_live_filters(layer: MaskedConv2d, shape: Sequence[int]) -> bool:
    """Whether Winograd's filtering with the live filters alone is the fastest for a layer, on images in NCHW."""
    if layer.weight.dtype != torch.float32 or not _is_3x3(layer):
        return False
    if min(layer.in_channels, layer.out_channels) < _LEAST_CHANNELS_OF_LIVE_FILTERS:
        return False
    rows, cols = output_size(shape[2:], (3, 3), *geometry_of(layer))
    tiles = -(-rows // 4) * -(-cols // 4)
    if shape[0] * tiles < _LEAST_TILES_OF_LIVE_FILTERS or 36 * tiles > _MOST_MULTIPLICATIONS * 9 * rows * cols:
        return False
    live = float(layer.weight_mask.flatten(2).any(2).double().mean())
    up_to = next(part for channels, part in _LIVE_UP_TO if layer.block[0] >= channels)
    return 0 < live <= up_to and layer.density >= _LEAST_KEPT_OF_LIVE * live


def winograd_tile(layer: nn.Conv2d, shape: Sequence[int]) -> int | None:
    """The rows of a tile for a layer and the shape of its input; None if oneDNN is faster or the only choice.

    Tiles of 4 x 4 pixels need the fewest multiplications, unless the edge of the image cuts many of them.

    Examples:
        >>> layer = nn.Conv2d(64, 64, 3, padding=1)
        >>> [winograd_tile(layer, (batch, 64, size, size)) for batch, size in ((64, 32), (64, 4), (1, 4))]
        [4, 2, None]
    """
    if not _is_3x3(layer) or min(layer.in_channels, layer.out_channels) < _LEAST_CHANNELS:
        return None
    rows, cols = output_size(shape[2:], (3, 3), *geometry_of(layer))
    of_image = {tile: -(-rows // tile) * -(-cols // tile) for tile in (2, 4)}
    enough = {tile: shape[0] * of_image[tile] >= _LEAST_TILES[tile] for tile in (2, 4)}
    if enough[4] and 36 * of_image[4] < 16 * of_image[2]:
        return 4
    return 2 if enough[2] and rows * cols > 1 else None


def is_faster_in_nchw(layer: nn.Conv2d, shape: Sequence[int]) -> bool:
    """Whether oneDNN takes less time in NCHW for a layer and the shape of its input, with two copies of the images.

    In channels_last, passes of wide layers with few pixels take longer (float32, torch 2.13, an Intel Xeon with
    AVX-512, batches of 4 to 256: with 256 channels 1.1 to 1.5 times as long at 4 x 4 pixels and as long at 6 x 6, with
    512 1.5 to 3.5 times at 2 x 2, 1.4 to 1.9 at 4 x 4 and 1.2 at 6 x 6). For single images, in 16 bits, with a stride
    and in all other layers, NCHW takes as long or longer.
    """
    if layer.weight.dtype != torch.float32 or shape[0] < _LEAST_IMAGES_IN_NCHW or layer.groups != 1:
        return False
    stride, padding, dilation = geometry_of(layer)
    if math.prod(layer.kernel_size) == 1 or stride != (1, 1):
        return False
    if min(layer.in_channels, layer.out_channels) < _LEAST_CHANNELS_IN_NCHW:
        return False
    pixels = math.prod(output_size(shape[2:], layer.kernel_size, stride, padding, dilation))
    return 1 < pixels <= _MOST_PIXELS_IN_NCHW


def _is_3x3(layer: nn.Conv2d) -> bool:
    """Whether a layer has 3 x 3 filters and a geometry that the ops of Winograd's filtering take."""
    if layer.groups != 1 or not pads_evenly(layer):
        return False
    stride, padding, dilation = geometry_of(layer)
    return (layer.kernel_size, stride, dilation) == ((3, 3), (1, 1), (1, 1)) and max(padding) <= 2
