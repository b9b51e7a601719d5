"""VGG-16 with BatchNorm, for small images."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from sparse_adv.models.initialisation import initialise
from sparse_adv.models.normalize import Normalize

_STAGES = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))
"""Of each stage, the channels in units of the width, and the number of convolutions."""


def vgg16(width: int, classes: int, input_shape: tuple[int, int, int], data: str) -> nn.Sequential:
    """Thirteen 3x3 convolutions with four max-pools between them, the mean over pixels and two linear layers.

    Convolutions have BatchNorm and ReLU, and no bias. Of 32 x 32 pixels 2 x 2 are left for the mean to take.

    Args:
        width: channels of the first stage; the others have 2, 4, 8 and 8 times as many, the hidden layer 8 times.
        classes: outputs.
        input_shape: [C, H, W] of one image, at least 16 x 16 pixels.
        data: whose statistics to normalise with.

    Raises:
        ValueError: if the images are too small for the max-pools.

    Source: Simonyan and Zisserman, "Very deep convolutional networks" (ICLR 2015), table 1 D; classifier and
        initialisation as in the code of Li et al., "Towards Practical Lottery Ticket Hypothesis for Adversarial
        Training" (arXiv 2003.05733).
    """
    channels, height, breadth = input_shape
    if min(height, breadth) < 16:
        raise ValueError(f"vgg16 halves images four times: they need at least 16 x 16 pixels, got {height} x {breadth}")
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
    initialise(model, gamma=0.5, linear_std=0.01)
    return model
