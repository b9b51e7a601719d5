"""A small convolutional network for 8 x 8 digits; its 64 to 128 channels are enough for sparse kernels to gain time."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from sparse_adv.models.normalize import Normalize


def digits_cnn(width: int, classes: int, input_shape: tuple[int, int, int], data: str) -> nn.Sequential:
    """Three 3x3 convolutions with BatchNorm and ReLU at full resolution, global average pooling and a classifier.

    Args:
        width: channels of the first convolution; the other two have twice as many.
        classes: number of outputs.
        input_shape: [C, H, W] of one image, of any size.
        data: name of the data set whose mean and standard deviation normalise the images.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(normalize=Normalize.of(data, input_shape[0]))
    channels = [input_shape[0], width, 2 * width, 2 * width]
    for i in range(1, len(channels)):
        layers[f"conv{i}"] = nn.Conv2d(channels[i - 1], channels[i], 3, padding=1, bias=False)
        layers[f"bn{i}"] = nn.BatchNorm2d(channels[i])
        layers[f"relu{i}"] = nn.ReLU()
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": nn.Linear(channels[-1], classes)}
    return nn.Sequential(layers)
