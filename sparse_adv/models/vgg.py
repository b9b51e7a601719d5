"""VGG-16 with BatchNorm, for small images."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from sparse_adv.models.normalize import Normalize

_STAGES = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))
"""The stages: channels as a multiple of the width, and number of convolutions."""


def vgg16(width: int, classes: int, input_shape: tuple[int, int, int], data: str) -> nn.Sequential:
    """Thirteen 3x3 convolutions with four max-pools between them, global average pooling and two linear layers.

    Each convolution is followed by BatchNorm and ReLU and has no bias. Images of 32 x 32 pixels reach the pooling with
    2 x 2 pixels.

    Args:
        width: channels of the first stage; the other stages have 2, 4, 8 and 8 times as many, and so has the hidden
            linear layer (8 times).
        classes: number of outputs.
        input_shape: [C, H, W] of one image, at least 16 x 16 pixels.
        data: name of the data set whose mean and standard deviation normalise the images.

    Raises:
        ValueError: if the images are too small for the max-pools.

    Source: Simonyan and Zisserman, "Very deep convolutional networks" (ICLR 2015), table 1 D; classifier and
    initialisation as in the code of Li et al., "Towards Practical Lottery Ticket Hypothesis for Adversarial Training"
    (arXiv 2003.05733).
    """
    channels = 8 * width
    classifier = nn.Sequential(
        nn.Linear(channels, channels), nn.BatchNorm1d(channels), nn.ReLU(), nn.Linear(channels, classes)
    )
    return _vgg(_features("vgg16", width, input_shape), 1, classifier, input_shape, data)


def vgg16_kuangliu(width: int, classes: int, input_shape: tuple[int, int, int], data: str) -> nn.Sequential:
    """VGG-16 as in kuangliu's pytorch-cifar: convolutions with a bias, five max-pools and one linear layer.

    Args:
        width, classes, data: as in `vgg16`.
        input_shape: [C, H, W] of one image, at least 32 x 32 pixels.

    Raises:
        ValueError: if the images are too small for the max-pools.
    """
    features = _features("vgg16_kuangliu", width, input_shape, bias=True, last_pool=True)
    return _vgg(features, 1, nn.Linear(8 * width, classes), input_shape, data)


def vgg16_hydra(width: int, classes: int, input_shape: tuple[int, int, int], data: str) -> nn.Sequential:
    """VGG-16 as in the code of HYDRA, HARP and the Adversarial Pruning Benchmark: three linear layers.

    Args:
        width, classes, input_shape, data: as in `vgg16`; the two hidden layers have 4 times as many units as the first
            stage has channels. The pooling leaves 2 x 2 pixels.

    Raises:
        ValueError: if the images are too small for the max-pools.

    Source: Sehwag et al., "HYDRA: pruning adversarially robust neural networks" (NeurIPS 2020).
    """
    hidden = 4 * width
    classifier = nn.Sequential(
        nn.Linear(4 * 8 * width, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, classes),
    )
    return _vgg(_features("vgg16_hydra", width, input_shape), 2, classifier, input_shape, data)


def _features(
    name: str, width: int, input_shape: tuple[int, int, int], bias: bool = False, last_pool: bool = False
) -> nn.Sequential:
    """The thirteen convolutions, each with BatchNorm and ReLU, and the max-pools between the stages."""
    channels, height, image_width = input_shape
    times, least = ("five", 32) if last_pool else ("four", 16)
    if min(height, image_width) < least:
        raise ValueError(
            f"{name} halves images {times} times: they need at least {least} x {least} pixels, got {height} x "
            f"{image_width}"
        )
    features: list[nn.Module] = []
    for i, (multiple, convolutions) in enumerate(_STAGES):
        if i > 0:
            features.append(nn.MaxPool2d(2))
        for _ in range(convolutions):
            features += [
                nn.Conv2d(channels, multiple * width, 3, padding=1, bias=bias),
                nn.BatchNorm2d(multiple * width),
                nn.ReLU(),
            ]
            channels = multiple * width
    if last_pool:
        features.append(nn.MaxPool2d(2))
    return nn.Sequential(*features)


def _vgg(
    features: nn.Sequential, pooled: int, classifier: nn.Module, input_shape: tuple[int, int, int], data: str
) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        normalize=Normalize.of(data, input_shape[0]),
        features=features,
        avgpool=nn.AdaptiveAvgPool2d(pooled),
        flatten=nn.Flatten(),
        classifier=classifier,
    )
    model = nn.Sequential(layers)
    _initialise(model)
    return model


def _initialise(model: nn.Module) -> None:
    """Convolutions from N(0, 2 / (K R S)) (He fan-out), BatchNorm2d's gamma 0.5, linear layers from N(0, 0.01^2)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 0.5)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
