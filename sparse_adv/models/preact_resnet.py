"""Residual networks whose BatchNorm and ReLU precede the convolutions: PreActResNet-18, and the family it is one of."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from sparse_adv.models.initialisation import initialise
from sparse_adv.models.normalize import Normalize
from sparse_adv.models.stages import head, stages


class PreActBlock(nn.Module):
    """conv2(relu(bn2(conv1(y)))) + x with y = relu(bn1(x)); where shapes differ, a 1x1 convolution of y replaces x."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(x))
        shortcut = x if self.downsample is None else self.downsample(out)
        out = self.conv1(out)
        return self.conv2(self.relu(self.bn2(out))) + shortcut


def preact_resnet18(width: int, classes: int, input_shape: tuple[int, int, int], data: str) -> nn.Sequential:
    """PreActResNet-18 with a 3x3 stem, no max-pool, and a last BatchNorm and ReLU before the mean over pixels.

    Args:
        width: channels of the first stage; the others have 2, 4 and 8 times as many.
        classes: outputs.
        input_shape: [C, H, W] of one image, of any size.
        data: whose statistics to normalise with.

    Source: He et al., "Identity mappings in deep residual networks" (ECCV 2016), section 4; the last BatchNorm, which
        some code leaves out, as in Wong et al., "Fast is better than free" (ICLR 2020).
    """
    return preact_network(width, [width, 2 * width, 4 * width, 8 * width], 2, classes, input_shape, data)


def preact_network(
    stem: int, widths: Sequence[int], depth: int, classes: int, input_shape: tuple[int, int, int], data: str
) -> nn.Sequential:
    """A pre-activation network.

    Args:
        stem: channels of the first convolution.
        widths: channels of each stage.
        depth: blocks per stage.
        classes: outputs.
        input_shape: [C, H, W] of one image, of any size.
        data: whose statistics to normalise with.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        normalize=Normalize.of(data, input_shape[0]),
        conv1=nn.Conv2d(input_shape[0], stem, 3, padding=1, bias=False),
    )
    layers |= stages(PreActBlock, stem, widths, depth)
    layers |= {"bn1": nn.BatchNorm2d(widths[-1]), "relu": nn.ReLU()}
    layers |= head(widths[-1], classes)
    model = nn.Sequential(layers)
    initialise(model)
    return model
