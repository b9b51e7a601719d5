"""What residual networks have in common: stages of blocks, and the way from the last features to class scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

Block = Callable[[int, int, int], nn.Module]
"""Makes a block from its input channels, output channels and stride."""


def stages(block: Block, stem: int, widths: Sequence[int], depth: int) -> dict[str, nn.Module]:
    """Stages "layer1", "layer2", ... of `depth` blocks each; every stage but the first halves the resolution.

    Args:
        block: makes one block.
        stem: channels that enter the first stage.
        widths: channels of each stage.
        depth: blocks per stage.
    """
    layers: dict[str, nn.Module] = {}
    channels = stem
    for i, width in enumerate(widths):
        first = block(channels, width, 1 if i == 0 else 2)
        layers[f"layer{i + 1}"] = nn.Sequential(first, *(block(width, width, 1) for _ in range(depth - 1)))
        channels = width
    return layers


def head(channels: int, classes: int) -> dict[str, nn.Module]:
    """The mean over pixels and a classifier."""
    return {"avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": nn.Linear(channels, classes)}
