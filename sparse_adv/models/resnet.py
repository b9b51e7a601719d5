"""Residual networks for small images: ResNet-18, -34 and -50, PreActResNet-18 and wide ones, WRN-depth-factor."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from sparse_adv.models.normalize import Normalize

BlockMaker = Callable[[int, int, int], nn.Module]
"""Makes a residual block from its input channels, output channels and stride."""


def _downsample(in_channels: int, out_channels: int, stride: int) -> nn.Module | None:
    """The operations of a shortcut: a 1x1 convolution with BatchNorm if shapes differ, else None."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)); the shortcut is a 1x1 convolution where shapes differ."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = _downsample(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + shortcut)


class Bottleneck(nn.Module):
    """A `BasicBlock` of three convolutions: 1x1 to a quarter of the output channels, 3x3 with the stride, 1x1."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        inner = out_channels // 4
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = _downsample(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu(self.bn3(self.conv3(out)) + shortcut)


class PreActBlock(nn.Module):
    """conv2(relu(bn2(conv1(y)))) + x with y = relu(bn1(x)); where shapes differ, a 1x1 convolution of y replaces x.

    Args:
        in_channels, out_channels, stride: of the block.
        raw_shortcut: whether the 1x1 convolution reads x instead of y.
        activation: the function in place of ReLU.
        pads_after: whether a convolution of stride 2 pads its images only at the bottom and the right, as TensorFlow
            does.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        *,
        raw_shortcut: bool = False,
        activation: type[nn.Module] = nn.ReLU,
        pads_after: bool = False,
    ) -> None:
        super().__init__()
        self.raw_shortcut = raw_shortcut
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu = activation()
        self.pad = nn.ZeroPad2d((0, 1, 0, 1)) if pads_after and stride == 2 else None
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=0 if self.pad else 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(x))
        shortcut = x if self.downsample is None else self.downsample(x if self.raw_shortcut else out)
        out = self.conv1(out if self.pad is None else self.pad(out))
        return self.conv2(self.relu(self.bn2(out))) + shortcut


def resnet(
    depths: Sequence[int],
    width: int,
    classes: int,
    input_shape: tuple[int, int, int],
    data: str,
    *,
    bottleneck: bool = False,
) -> nn.Sequential:
    """ResNet with a 3x3 first convolution and no max-pool; modules have torchvision's names.

    Args:
        depths: blocks of each stage: 2, 2, 2, 2 for ResNet-18; 3, 4, 6, 3 for ResNet-34 and ResNet-50.
        width: channels of the first convolution and of the first stage (with bottleneck, the stage's output has four
            times as many); each further stage has twice as many.
        classes: number of outputs.
        input_shape: [C, H, W] of one image, of any size.
        data: name of the data set whose mean and standard deviation normalise the images.
        bottleneck: whether blocks have three convolutions, as in ResNet-50, with the stride in the 3x3 one.

    Source: He et al., "Deep residual learning for image recognition" (CVPR 2016), section 3.3; first convolution as in
    section 4.2; initialisation see `_initialise`.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        normalize=Normalize.of(data, input_shape[0]),
        conv1=nn.Conv2d(input_shape[0], width, 3, padding=1, bias=False),
        bn1=nn.BatchNorm2d(width),
        relu=nn.ReLU(),
    )
    first = 4 * width if bottleneck else width
    widths = [first * 2**i for i in range(len(depths))]
    layers |= _stages(Bottleneck if bottleneck else BasicBlock, width, widths, depths)
    layers |= _head(widths[-1], classes)
    return _initialise(nn.Sequential(layers))


def preact_resnet18(
    width: int,
    classes: int,
    input_shape: tuple[int, int, int],
    data: str,
    *,
    last_norm: bool = True,
    raw_shortcut: bool = False,
) -> nn.Sequential:
    """PreActResNet-18 with a 3x3 first convolution, no max-pool, and BatchNorm and ReLU before the global pooling.

    Args:
        width: channels of the first stage; the other stages have 2, 4 and 8 times as many.
        classes: number of outputs.
        input_shape: [C, H, W] of one image, of any size.
        data: name of the data set whose mean and standard deviation normalise the images.
        last_norm: whether BatchNorm and ReLU come before the pooling.
        raw_shortcut: as in `PreActBlock`.

    Source: He et al., "Identity mappings in deep residual networks" (ECCV 2016), section 4. Public code differs in the
    last two arguments: both are as here in the code of Rice et al., "Overfitting in adversarially robust deep
    learning" (ICML 2020).
    """
    widths = [width, 2 * width, 4 * width, 8 * width]
    block = partial(PreActBlock, raw_shortcut=raw_shortcut)
    return _preact_network(block, width, widths, 2, classes, input_shape, data, nn.ReLU() if last_norm else None)


def wide_resnet(
    depth: int,
    factor: int,
    width: int,
    classes: int,
    input_shape: tuple[int, int, int],
    data: str,
    *,
    silu: bool = False,
) -> nn.Sequential:
    """Wide residual network WRN-depth-factor: three stages of pre-activation blocks, without dropout.

    Args:
        depth: number of layers with weights, 4 plus a multiple of 6, at least 10.
        factor: the stages have factor, 2 factor and 4 factor times the channels of the first convolution.
        width: channels of the first convolution, 16 in the paper.
        classes: number of outputs.
        input_shape: [C, H, W] of one image, of any size; with silu, sides must be multiples of 4.
        data: name of the data set whose mean and standard deviation normalise the images.
        silu: whether to use SiLU (Swish) in place of ReLU, and to pad as TensorFlow does, see `PreActBlock`.

    Raises:
        ValueError: if depth, factor or, with silu, the size of the images is out of range.

    Source: Zagoruyko and Komodakis, "Wide residual networks" (BMVC 2016), section 2; with silu Gowal et al.,
    "Uncovering the limits of adversarial training" (arXiv 2010.03593), section 4.4.
    """
    if depth < 10 or (depth - 4) % 6 != 0:
        raise ValueError(
            f"the depth D of wrn-D-K must be 4 plus a multiple of 6 (10, 16, 22, 28, 34, ...), got {depth}"
        )
    if factor < 1:
        raise ValueError(f"the factor K of wrn-D-K must be at least 1, got {factor}")
    if silu and any(size % 4 for size in input_shape[1:]):
        raise ValueError(f"wrn-D-K-silu needs images whose sides are multiples of 4, got {list(input_shape[1:])}")
    widths = [width * factor, 2 * width * factor, 4 * width * factor]
    activation = nn.SiLU if silu else nn.ReLU
    block = partial(PreActBlock, activation=activation, pads_after=silu)
    return _preact_network(block, width, widths, (depth - 4) // 6, classes, input_shape, data, activation())


def _preact_network(
    block: BlockMaker,
    stem: int,
    widths: Sequence[int],
    depth: int,
    classes: int,
    input_shape: tuple[int, int, int],
    data: str,
    last: nn.Module | None,
) -> nn.Sequential:
    """A first convolution of `stem` channels, stages of `depth` blocks with `widths` channels, and the head.

    If `last` is given, BatchNorm and the activation `last` come before the head.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        normalize=Normalize.of(data, input_shape[0]),
        conv1=nn.Conv2d(input_shape[0], stem, 3, padding=1, bias=False),
    )
    layers |= _stages(block, stem, widths, [depth] * len(widths))
    if last is not None:
        layers |= {"bn1": nn.BatchNorm2d(widths[-1]), "relu": last}
    layers |= _head(widths[-1], classes)
    return _initialise(nn.Sequential(layers))


def _stages(block: BlockMaker, stem: int, widths: Sequence[int], depths: Sequence[int]) -> dict[str, nn.Module]:
    """Stages "layer1", "layer2", ... with their numbers of blocks; every stage but the first halves the resolution."""
    layers: dict[str, nn.Module] = {}
    channels = stem
    for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
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
