"""VGG-16 with BatchNorm, for small images."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from sparse_adv.models.normalize import Normalize

_STAGES = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))
"""For each stage the channels as a multiple of the width, and the number of convolutions."""


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
    channels, height, image_width = input_shape
    if min(height, image_width) < 16:
        raise ValueError(
            f"vgg16 halves images four times: they need at least 16 x 16 pixels, got {height} x {image_width}"
        )
    features: list[nn.Module] = []
    for i, (multiple, convolutions) in enumerate(_STAGES):
        if i > 0:
            features.append(nn.MaxPool2d(2))
        for _ in range(convolutions):
            features += [
                nn.Conv2d(channels, multiple * width, 3, padding=1, bias=False),
                nn.BatchNorm2d(multiple * width),
                nn.ReLU(),
            ]
            channels = multiple * width
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        normalize=Normalize.of(data, input_shape[0]),
        features=nn.Sequential(*features),
        avgpool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        classifier=nn.Sequential(
            nn.Linear(channels, channels), nn.BatchNorm1d(channels), nn.ReLU(), nn.Linear(channels, classes)
        ),
    )
    model = nn.Sequential(layers)
    _initialise(model)
    return model


def _initialise(model: nn.Module) -> None:
    """Convolutions from N(0, 2 / (K R S)) (He fan-out), BatchNorm2d's gamma 0.5, linear layers from N(0, 0.01^2)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 0.5)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
