"""The multiply-adds (MACs) that a model executes with the kernels of its masked layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from sparse_adv.argument_types import checks_types
from sparse_adv.masks.layers import Layer, masks_by_module, run_once, uses, weight_of
from sparse_adv.nn.masked_conv2d import MaskedConv2d
from sparse_adv.nn.masked_layer import MaskedLayer
from sparse_adv.nn.masked_linear import MaskedLinear
from sparse_adv.ops import PassPlan, Plan


class Macs(NamedTuple):
    """MACs of one batch; `count_macs` returns it."""

    forward: int
    grad_input: int
    """MACs of grad_input in all layers. An attack executes these, because it needs the gradient of the images."""
    grad_weight: int
    first_grad_input: int
    """The part of `grad_input` that belongs to the first layer; training without an attack does not execute it."""
    kept: int
    """MACs of the weights that masks keep, in each of the three passes; with dense kernels, more are executed."""
    dense: int
    """MACs that each of the three passes would execute without masks."""
    images: int
    """The batch's size."""

    def per_image(self) -> Macs:
        """The MACs for one image of the batch, with the kernels that the whole batch uses."""
        return Macs(*(count // max(1, self.images) for count in self))


class LayerCall(NamedTuple):
    """One call of a convolution or linear layer in a forward pass."""

    layer: Layer
    uses: int
    """How often each weight was multiplied."""
    plan: Plan


@checks_types
def count_macs(model: nn.Module, example_input: Sequence[int] | Tensor) -> Macs:
    """Count the MACs that the convolutions and linear layers of a model execute on one batch.

    A pass executes `weights * positions`: positions are the layer's output pixels (for a linear layer, output rows)
    over the whole batch; weights are those kept by the mask if the pass runs a sparse kernel, else all of the layer's,
    because a dense kernel multiplies zeros too. Taps on padding count, and each call of a layer counts.

    Args:
        model: any model, dense or sparse; it runs one forward pass, in eval mode, and stays as it was.
        example_input: a batch of its input, or the shape [N, C, H, W] of one.

    Returns:
        The MACs of each pass over the whole batch.

    Raises:
        ValueError: if `example_input` is neither a tensor nor 4 positive integers.

    Examples:
        >>> count_macs(nn.Conv2d(3, 8, 3), (1, 3, 6, 6)).forward == 4 * 4 * 8 * 3 * 3 * 3
        True
    """
    calls = calls_of(model, example_input)
    images = example_input.shape[0] if isinstance(example_input, Tensor) else example_input[0]
    if not calls:
        return Macs(0, 0, 0, 0, 0, 0, images)
    return Macs(
        forward=sum(call.plan.forward.macs for call in calls),
        grad_input=sum(call.plan.grad_input.macs for call in calls),
        grad_weight=sum(call.plan.grad_weight.macs for call in calls),
        first_grad_input=calls[0].plan.grad_input.macs,
        kept=sum(call.uses * kept_weights(call.layer) for call in calls),
        dense=sum(call.uses * weight_of(call.layer).numel() for call in calls),
        images=images,
    )


@checks_types
def mac_density(model: nn.Module, masks: Mapping[str, Tensor], example_input: Sequence[int] | Tensor) -> float:
    """Return the fraction of a model's MACs that masks keep: (MACs of the weights kept) / (MACs of all weights).

    It differs from the density of the weights, because a convolution uses each weight once per output pixel and a
    linear layer once per row of its input. Layers without a mask count as dense.

    Args:
        model: the model that the masks belong to, dense or sparse; it runs one forward pass, in eval mode.
        masks: bool masks keyed by module name.
        example_input: a batch of the model's input, or the shape [N, C, H, W] of one; the result does not depend on N.

    Returns:
        The density, in [0, 1].

    Raises:
        TypeError: if a mask is not a bool tensor, or is for a module that is no Conv2d or Linear.
        ValueError: if a mask's name is unknown, its shape is not the weight's, or the model has no convolution and no
            linear layer.

    Examples:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, stride=2))
        >>> masks = {"1": torch.zeros(8, 8, 3, 3, dtype=torch.bool)}
        >>> mac_density(model, masks, (1, 3, 5, 5))  # 25 * 24 of 25 * 24 + 4 * 576 MACs
        0.2066115702479339
    """
    weights_kept = {layer: int(mask.count_nonzero()) for layer, mask in masks_by_module(model, masks).items()}
    calls = calls_of(model, example_input)
    dense = sum(call.uses * weight_of(call.layer).numel() for call in calls)
    if dense == 0:
        raise ValueError("model must run a convolution or a linear layer, but it has no MACs")
    return sum(call.uses * weights_kept.get(call.layer, weight_of(call.layer).numel()) for call in calls) / dense


def calls_of(model: nn.Module, example_input: Sequence[int] | Tensor) -> list[LayerCall]:
    """The calls of convolutions and linear layers in one forward pass, in their order, each with its plan."""
    calls: list[LayerCall] = []

    def visit(layer: Layer, input: Tensor, output: Tensor) -> None:
        count = uses(layer, output)
        if isinstance(layer, MaskedConv2d) and not layer.weight.is_meta:
            plan = layer.plan(input)
        else:
            reason = "linear" if isinstance(layer, MaskedLinear) else "no mask"
            plan = Plan(*[PassPlan("dense", reason, count * weight_of(layer).numel())] * 3)
        calls.append(LayerCall(layer, count, plan))

    run_once(model, example_input, visit, linear=True)
    return calls


def kept_weights(layer: Layer) -> int:
    """The number of weights that the layer's mask keeps; all of them without a mask."""
    if isinstance(layer, MaskedLayer) and layer.weight_mask.is_meta:
        raise ValueError("model must have values to count kept weights, a mask of it is on the meta device")
    if isinstance(layer, MaskedConv2d):
        return layer.pattern.nonzeros
    return int(layer.weight_mask.count_nonzero()) if isinstance(layer, MaskedLayer) else weight_of(layer).numel()
