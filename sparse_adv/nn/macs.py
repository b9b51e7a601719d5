"""What a model executes: the multiply-adds of each pass, with the kernels that its masked layers take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from sparse_adv.masks.layers import Layer, run_once, uses
from sparse_adv.nn.masked_conv2d import MaskedConv2d
from sparse_adv.ops import PASSES


class Work(NamedTuple):
    """Multiply-adds of one batch: what `multiply_adds` returns."""

    forward: int
    grad_input: int
    """Of all layers: what an attack needs, which follows the gradient down to the images."""
    grad_weight: int
    first_grad_input: int
    """The part of `grad_input` that the first layer executed has: training without an attack leaves it out."""
    dense: int
    """What each of the three passes executes without masks."""
    first_dense: int
    """The part of `dense` that the first layer executed has."""
    images: int
    """The batch's size."""

    def per_image(self) -> Work:
        """The same for one image of the batch, with the kernels that the batch takes."""
        return Work(*(count // max(1, self.images) for count in self))


def multiply_adds(model: nn.Module, shape: Sequence[int] | Tensor) -> Work:
    """Count the multiply-adds that the convolutions and linear layers of a model execute on one batch.

    A pass executes `weights * positions`: positions are the layer's output pixels (of a linear layer, output rows) over
    the whole batch; weights are the kept ones where the pass takes a sparse kernel, else all of the layer's, for a
    dense kernel multiplies the zeros as well. Taps that fall on padding count. Each call of a layer counts.

    Args:
        model: any model, dense or sparse; it runs one forward pass, in eval mode, and stays as it was.
        shape: shape [N, C, H, W] of its input, or a sample of it.
    """
    calls: list[Work] = []

    def visit(layer: Layer, input: Tensor, output: Tensor) -> None:
        count = uses(layer, output)
        dense = count * layer.weight.numel()
        executed = dict.fromkeys(PASSES, dense)
        if isinstance(layer, MaskedConv2d):
            kept = count * int(layer.weight_mask.count_nonzero())
            executed |= {name: kept for name, path in layer.paths(input).items() if path == "sparse"}
        calls.append(Work(**executed, first_grad_input=0, dense=dense, first_dense=0, images=0))

    run_once(model, shape, visit, linear=True)
    images = shape.shape[0] if isinstance(shape, Tensor) else shape[0]
    if not calls:
        return Work(0, 0, 0, 0, 0, 0, images)
    total = Work(*map(sum, zip(*calls, strict=True)))
    return total._replace(first_grad_input=calls[0].grad_input, first_dense=calls[0].dense, images=images)
