"""Residual networks for small images: ResNet-18, PreActResNet-18 and wide residual networks WRN-depth-factor."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from sparse_adv.models.normalize import Normalize

Block = Callable[[int, int, int], nn.Module]
"""Makes a residual block from its input channels, output channels and stride."""


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


def resnet18(width: int, classes: int, input_shape: tuple[int, int, int], data: str) -> nn.Sequential:
    """ResNet-18 with a 3x3 first convolution and no max-pool; modules have torchvision's names.

    Args:
        width: channels of the first stage; the other stages have 2, 4 and 8 times as many.
        classes: number of outputs.
        input_shape: [C, H, W] of one image, of any size.
        data: name of the data set whose mean and standard deviation normalise the images.

    Source: He et al., "Deep residual learning for image recognition" (CVPR 2016), section 3.3; first convolution as in
    section 4.2; initialisation see `_initialise`.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        normalize=Normalize.of(data, input_shape[0]),
        conv1=nn.Conv2d(input_shape[0], width, 3, padding=1, bias=False),
        bn1=nn.BatchNorm2d(width),
        relu=nn.ReLU(),
    )
    layers |= _stages(BasicBlock, width, [width, 2 * width, 4 * width, 8 * width], depth=2)
    layers |= _head(8 * width, classes)
    return _initialise(nn.Sequential(layers))


def preact_resnet18(width: int, classes: int, input_shape: tuple[int, int, int], data: str) -> nn.Sequential:
    """PreActResNet-18 with a 3x3 first convolution, no max-pool, and BatchNorm and ReLU before the global pooling.

    Args:
        width: channels of the first stage; the other stages have 2, 4 and 8 times as many.
        classes: number of outputs.
        input_shape: [C, H, W] of one image, of any size.
        data: name of the data set whose mean and standard deviation normalise the images.

    Source: He et al., "Identity mappings in deep residual networks" (ECCV 2016), section 4. Some public code leaves the
    last BatchNorm out; it is present here as in Wong et al., "Fast is better than free" (ICLR 2020).
    """
    return _preact_network(width, [width, 2 * width, 4 * width, 8 * width], 2, classes, input_shape, data)


def wide_resnet(
    depth: int, factor: int, width: int, classes: int, input_shape: tuple[int, int, int], data: str
) -> nn.Sequential:
    """Wide residual network WRN-depth-factor: three stages of pre-activation blocks, without dropout.

    Args:
        depth: number of layers with weights, 4 plus a multiple of 6, at least 10.
        factor: the stages have factor, 2 factor and 4 factor times the channels of the first convolution.
        width: channels of the first convolution, 16 in the paper.
        classes: number of outputs.
        input_shape: [C, H, W] of one image, of any size.
        data: name of the data set whose mean and standard deviation normalise the images.

    Raises:
        ValueError: if depth or factor is out of range.

    Source: Zagoruyko and Komodakis, "Wide residual networks" (BMVC 2016), section 2.
    """
    if depth < 10 or (depth - 4) % 6 != 0:
        raise ValueError(
            f"the depth D of wrn-D-K must be 4 plus a multiple of 6 (10, 16, 22, 28, 34, ...), got {depth}"
        )
    if factor < 1:
        raise ValueError(f"the factor K of wrn-D-K must be at least 1, got {factor}")
    widths = [width * factor, 2 * width * factor, 4 * width * factor]
    return _preact_network(width, widths, (depth - 4) // 6, classes, input_shape, data)


def _preact_network(
    stem: int, widths: Sequence[int], depth: int, classes: int, input_shape: tuple[int, int, int], data: str
) -> nn.Sequential:
    """A first convolution of `stem` channels, stages of `depth` PreActBlocks with `widths` channels, and the head."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        normalize=Normalize.of(data, input_shape[0]),
        conv1=nn.Conv2d(input_shape[0], stem, 3, padding=1, bias=False),
    )
    layers |= _stages(PreActBlock, stem, widths, depth)
    layers |= {"bn1": nn.BatchNorm2d(widths[-1]), "relu": nn.ReLU()}
    layers |= _head(widths[-1], classes)
    return _initialise(nn.Sequential(layers))


def _stages(block: Block, stem: int, widths: Sequence[int], depth: int) -> dict[str, nn.Module]:
    """Stages "layer1", "layer2", ... of `depth` blocks each; every stage but the first halves the resolution."""
    layers: dict[str, nn.Module] = {}
    channels = stem
    for i, width in enumerate(widths):
        first = block(channels, width, 1 if i == 0 else 2)
        layers[f"layer{i + 1}"] = nn.Sequential(first, *(block(width, width, 1) for _ in range(depth - 1)))
        channels = width
    return layers


def _head(channels: int, classes: int) -> dict[str, nn.Module]:
    """Global average pooling and a linear classifier."""
    return {"avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": nn.Linear(channels, classes)}


def _initialise(model: nn.Sequential) -> nn.Sequential:
    """Draw convolutions from N(0, 2 / (K R S)) (K output channels, R x S filter), set the classifier's bias to 0.

    Source: He et al., "Delving deep into rectifiers" (ICCV 2015), section 2.2, backward case (fan-out).
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    return model
