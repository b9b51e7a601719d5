"""Wide residual networks WRN-depth-factor."""

from __future__ import annotations

from torch import nn

from sparse_adv.models.preact_resnet import preact_network


def wide_resnet(
    depth: int, factor: int, width: int, classes: int, input_shape: tuple[int, int, int], data: str
) -> nn.Sequential:
    """A pre-activation network of three stages, without dropout.

    Args:
        depth: convolutions in a row and the classifier: 4 plus a multiple of 6, at least 10.
        factor: how many times wider than the stem the first stage is; the others are 2 and 4 times as wide as that.
        width: channels of the stem, 16 in the paper.
        classes: outputs.
        input_shape: [C, H, W] of one image, of any size.
        data: whose statistics to normalise with.

    Raises:
        ValueError: if there is no network of that depth or factor.

    Source: Zagoruyko and Komodakis, "Wide residual networks" (BMVC 2016), section 2.
    """
    if depth < 10 or (depth - 4) % 6 != 0:
        raise ValueError(
            f"the depth D of wrn-D-K must be 4 plus a multiple of 6 (10, 16, 22, 28, 34, ...), got {depth}"
        )
    if factor < 1:
        raise ValueError(f"the factor K of wrn-D-K must be at least 1, got {factor}")
    widths = [width * factor, 2 * width * factor, 4 * width * factor]
    return preact_network(width, widths, (depth - 4) // 6, classes, input_shape, data)
