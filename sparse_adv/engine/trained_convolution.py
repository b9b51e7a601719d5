"""A dense convolution in training, by the kernel that is fastest for its batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from sparse_adv import ops
from sparse_adv.engine.fastest_kernel import is_faster_in_nchw, winograd_tile
from sparse_adv.engine.model_state import has_hooks
from sparse_adv.masks.layers import computes_as
from sparse_adv.ops.conv_geometry import geometry_of
from sparse_adv.ops.transforms import is_transformed


class TrainedConvolution:
    """A convolution in training, computed by Winograd's filtering, or in NCHW, where that is faster."""

    def __init__(self, layer: nn.Conv2d) -> None:
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        layer, tile = self.layer, None
        if onednn_writes_out_of_bounds(layer):
            rows, cols = _pair(layer.stride)  # on the pixels that are read, the convolution has stride 1
            return F.conv2d(x[:, :, ::rows, ::cols], layer.weight, layer.bias)
        if is_transformed() or torch.is_autocast_enabled("cpu") or x.dim() != 4:
            return layer(x)
        is_channels_last = x.is_contiguous(memory_format=torch.channels_last)
        if is_channels_last and x.dtype == layer.weight.dtype == torch.float32:
            tile = winograd_tile(layer, x.shape)
        if tile is None and is_channels_last and is_faster_in_nchw(layer, x.shape):
            return layer(x.contiguous()).contiguous(memory_format=torch.channels_last)
        if tile is None:
            return layer(x)
        return ops.winograd_conv2d(x, layer.weight, layer.bias, geometry_of(layer).padding, tile=tile)


def onednn_writes_out_of_bounds(layer: nn.Conv2d) -> bool:
    """Whether computing the gradient of the weight may crash if images or weight are channels_last.

    oneDNN's AVX2 kernel for strided 1 x 1 convolutions with fewer than 8 input channels does so (torch 2.13).
    """
    strided = _pair(layer.stride) != (1, 1)
    is_strided_1x1 = layer.kernel_size == (1, 1) and strided and layer.padding in (0, (0, 0), "valid")
    return is_strided_1x1 and layer.groups == 1 and layer.in_channels < 8


def is_plain_convolution(module: nn.Module | None) -> bool:
    """Whether a module is a dense convolution on a CPU that runs only PyTorch's code, also for its weight."""
    if not isinstance(module, nn.Conv2d) or "weight" not in module._parameters or has_hooks(module):
        return False
    return module.weight.device.type == "cpu" and computes_as(module, nn.Conv2d)
