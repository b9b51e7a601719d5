"""Which layers Winograd's filtering computes fastest on a CPU in float32: dense in channels_last, masked in NCHW.

`benchmarks/winograd_thresholds.py` shows on any machine where each threshold lies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from sparse_adv import ops
from sparse_adv.engine.model_state import has_hooks
from sparse_adv.kernels.layout import output_size
from sparse_adv.masks.layers import computes_as
from sparse_adv.nn import MaskedConv2d
from sparse_adv.ops.conv_geometry import geometry_of
from sparse_adv.ops.transforms import is_transformed

_LEAST_CHANNELS = 16
_LEAST_TILES = {2: 64, 4: 128}
"""Of a batch; round numbers about what was measured. Transforming the weights takes as long as about 90 tiles of 4 x 4
pixels, or 110 of 2 x 2, save in one pass. So 128 of 4 x 4 pay in every pass, also in training, which transforms the
weights for each. 64 of 2 x 2 pay from the second step of an attack on, which transforms them once for all steps."""

_SPARSE_UP_TO = ((4, 0.4), (2, 0.35), (1, 0.27))
"""For output channels of a mask's block, or more, the density up to which the sparse kernel is faster. Measured on one
gradient of 64 images, ResNet-18 of width 64, an Intel Xeon with AVX-512: (1, 1) at 0.2 and 0.3 sparse 383 and 522 ms,
Winograd 480; (2, 2) at 0.3 and 0.4 421 and 517, 465; (4, 4) at 0.4 and 0.5 467 and 577, 470."""

_LIVE_UP_TO = ((4, 0.8), (2, 0.5), (1, 0.4))
"""For output channels of a mask's block, or more, the part of the filters up to which the sparse products are faster
than Winograd's dense ones. Measured on four layers of a ResNet-18, 64 images, an Intel Xeon with AVX-512, parts of the
dense time: blocks of 4 take 0.7 to 0.8 at 0.6 and 0.8 to 1.04 at 0.8, blocks of 2 0.6 to 0.9 at 0.4 and 0.8 to 1.3 at
0.6, blocks of 1 0.4 to 0.7 at 0.2 and 0.6 to 1.3 at 0.4. One gradient of a ResNet-18 on a Zen 4: dense products take
1.20 and 1.10 times as long at 0.7 and 0.8 (blocks of 4), 1.14 and 1.01 at 0.5 and 0.6 (2), 1.30 and 1.12 at 0.4 and 0.5
(1)."""
_LEAST_KEPT_OF_LIVE = 2 / 3
"""The part of their weights that live filters keep: the others are multiplied for nothing. At 0.4 (single weights, of
that density) filtering is 1.4 times as fast as the direct kernel with 64 and 128 channels, but takes 1.3 times as long
with 256 and 2.7 to 4 times with 512."""
_LEAST_CHANNELS_OF_LIVE_FILTERS = 32
_LEAST_TILES_OF_LIVE_FILTERS = 32
_MOST_MULTIPLICATIONS = 0.8
"""Of those of a direct convolution: small images fill tiles badly, one of 2 x 2 pixels takes as many."""


def sparse_is_faster(layer: MaskedConv2d, shape: Sequence[int]) -> bool:
    """Whether the direct sparse kernel is the fastest for a layer, where others may be channels_last."""
    if layer.plan(layer.weight.new_empty(shape)).forward.kernel != "sparse":
        return False
    if layer.weight.dtype != torch.float32 or winograd_tile(layer, shape) is None:
        return True
    return layer.density <= next(density for channels, density in _SPARSE_UP_TO if layer.block[0] >= channels)


def takes_live_filters(layer: MaskedConv2d, shape: Sequence[int]) -> bool:
    """Whether Winograd's filtering of the filters that are kept is the fastest for a layer, on images in NCHW."""
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
    """The rows of a tile for a layer and the shape of its input; None where oneDNN is faster or must take it.

    Tiles of 4 x 4 pixels multiply least, unless many of them are cut by the edge of the image.

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


def _is_3x3(layer: nn.Conv2d) -> bool:
    """Whether a layer has 3 x 3 filters and a geometry that the ops of Winograd's filtering take."""
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros" or layer.groups != 1:
        return False
    stride, padding, dilation = geometry_of(layer)
    return (layer.kernel_size, stride, dilation) == ((3, 3), (1, 1), (1, 1)) and max(padding) <= 2


class TrainedConvolution:
    """A convolution in training, by Winograd's filtering where that is faster."""

    def __init__(self, layer: nn.Conv2d) -> None:
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        layer, tile = self.layer, None
        if onednn_writes_out_of_bounds(layer):
            rows, cols = _pair(layer.stride)  # on the pixels that are read, the convolution has stride 1
            return F.conv2d(x[:, :, ::rows, ::cols], layer.weight, layer.bias)
        if x.dtype == layer.weight.dtype == torch.float32 and x.is_contiguous(memory_format=torch.channels_last):
            tile = winograd_tile(layer, x.shape)
        if tile is None or is_transformed() or torch.is_autocast_enabled("cpu"):
            return layer(x)
        return ops.winograd_conv2d(x, layer.weight, layer.bias, _pair(layer.padding), tile=tile)


def onednn_writes_out_of_bounds(layer: nn.Conv2d) -> bool:
    """Whether the gradient of the weight may end the process where images or weight are channels_last.

    oneDNN's AVX2 kernel of strided 1 x 1 convolutions does that with fewer than 8 input channels (torch 2.13).
    """
    strided = _pair(layer.stride) != (1, 1)
    is_strided_1x1 = layer.kernel_size == (1, 1) and strided and layer.padding in (0, (0, 0), "valid")
    return is_strided_1x1 and layer.groups == 1 and layer.in_channels < 8


def is_plain_convolution(module: nn.Module | None) -> bool:
    """Whether a module is a dense convolution on a CPU that runs no code but PyTorch's, also for its weight."""
    if not isinstance(module, nn.Conv2d) or "weight" not in module._parameters or has_hooks(module):
        return False
    return module.weight.device.type == "cpu" and computes_as(module, nn.Conv2d)
