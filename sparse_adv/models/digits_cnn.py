"""A small CNN for 8 x 8 digits, wide enough (64-128 channels) for sparse kernels to pay."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from sparse_adv.models.normalize import Normalize


def digits_cnn(width: int, classes: int, input_shape: tuple[int, int, int], data: str) -> nn.Sequential:
    """Three 3x3 convolutions with BatchNorm and ReLU at full resolution, then the mean over pixels and a classifier.

    Args:
        width: channels of the first convolution; the others have twice as many.
        classes: outputs.
        input_shape: [C, H, W] of one image, of any size.
        data: whose statistics to normalise with.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(normalize=Normalize.of(data, input_shape[0]))
    channels = [input_shape[0], width, 2 * width, 2 * width]
    for i in range(1, len(channels)):
        layers[f"conv{i}"] = nn.Conv2d(channels[i - 1], channels[i], 3, padding=1, bias=False)
        layers[f"bn{i}"] = nn.BatchNorm2d(channels[i])
        layers[f"relu{i}"] = nn.ReLU()
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": nn.Linear(channels[-1], classes)}
    return nn.Sequential(layers)
