"""Density and distance of masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from sparse_adv.masks.layers import Layer, run_once, unknown_module, uses


def density(masks: Mapping[str, Tensor]) -> float:
    """Return the fraction of weights that masks keep: (number of true elements) / (number of elements) of all masks.

    Raises:
        ValueError: if the masks have no element.

    Examples:
        >>> import torch
        >>> from sparse_adv import masks
        >>> masks.density({"conv": torch.tensor([[True, False], [False, False]])})
        0.25
    """
    total = sum(mask.numel() for mask in masks.values())
    if total == 0:
        raise ValueError(f"masks must have at least one element, got {len(masks)} masks without any")
    return sum(int(mask.count_nonzero()) for mask in masks.values()) / total


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Return the normalised Hamming distance of two sets of masks: the fraction of elements that differ.

    Early-Bird tickets end a search when this distance between masks of successive epochs is below 0.1.

    Args:
        a, b: bool masks keyed by module name, with the same names and shapes.

    Raises:
        ValueError: if names or shapes differ.

    Source: You et al., "Drawing early-bird tickets" (ICLR 2020), section 3.2.

    Examples:
        >>> import torch
        >>> from sparse_adv import masks
        >>> a, b = torch.tensor([True, True, False, False]), torch.tensor([True, False, False, False])
        >>> masks.distance({"conv": a}, {"conv": b})
        0.25
    """
    if a.keys() != b.keys():
        raise ValueError(
            f"a and b must have masks of the same modules, but only one of them has {sorted(a.keys() ^ b.keys())}"
        )
    for name in a:
        if a[name].shape != b[name].shape:
            raise ValueError(
                f"the masks of {name!r} must have the same shape, got {tuple(a[name].shape)} and {tuple(b[name].shape)}"
            )
    return density({name: a[name] != b[name].to(a[name].device) for name in a})


def multiply_add_density(model: nn.Module, masks: Mapping[str, Tensor], input_shape: Sequence[int]) -> float:
    """The fraction of the multiply-adds of convolutions and linear layers that remains under the masks.

    It differs from the density of weights: a convolution's weight is used once per output pixel, and early images are
    large; a linear layer's is used once per row of its input. Layers without a mask count as dense; a forward pass in
    eval mode finds the sizes.

    Args:
        model: the model that the masks belong to, sparse or dense.
        masks: bool tensors keyed by module name.
        input_shape: the model's input [N, C, H, W]; N = 1 will do.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in masks:
        if name not in modules:
            raise ValueError(unknown_module(name, modules))
    by_layer = {modules[name]: mask for name, mask in masks.items()}
    kept = dense = 0

    def visit(layer: Layer, input: Tensor, output: Tensor) -> None:
        nonlocal kept, dense
        count, weights = uses(layer, output), layer.weight.numel()
        dense += count * weights
        kept += count * (int(by_layer[layer].count_nonzero()) if layer in by_layer else weights)

    run_once(model, input_shape, visit, linear=True)
    if dense == 0:
        raise ValueError("model runs no convolution and no linear layer, so there are no multiply-adds to count")
    return kept / dense
