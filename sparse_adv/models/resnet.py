"""ResNet-18 for small images."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from sparse_adv.models.initialisation import initialise
from sparse_adv.models.normalize import Normalize
from sparse_adv.models.stages import head, stages


class BasicBlock(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)); the shortcut is a 1x1 convolution where shapes differ."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + shortcut)


def resnet18(width: int, classes: int, input_shape: tuple[int, int, int], data: str) -> nn.Sequential:
    """ResNet-18 with a 3x3 stem and no max-pool; its modules are called as torchvision's.

    Args:
        width: channels of the first stage; the others have 2, 4 and 8 times as many.
        classes: outputs.
        input_shape: [C, H, W] of one image, of any size.
        data: whose statistics to normalise with.

    Source: He et al., "Deep residual learning for image recognition" (CVPR 2016), section 3.3; stem as in section 4.2.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        normalize=Normalize.of(data, input_shape[0]),
        conv1=nn.Conv2d(input_shape[0], width, 3, padding=1, bias=False),
        bn1=nn.BatchNorm2d(width),
        relu=nn.ReLU(),
    )
    layers |= stages(BasicBlock, width, [width, 2 * width, 4 * width, 8 * width], depth=2)
    layers |= head(8 * width, classes)
    model = nn.Sequential(layers)
    initialise(model)
    return model
