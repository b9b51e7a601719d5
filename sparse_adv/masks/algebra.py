"""Density and distance of masks."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from sparse_adv.argument_types import checks_types
from sparse_adv.masks.layers import masks_by_module, owners


@checks_types
def density(masks: Mapping[str, Tensor], model: nn.Module | None = None) -> float:
    """Return the fraction of weights that masks keep: (number of true elements) / (number of elements) of all masks.

    Args:
        masks: bool masks keyed by module name.
        model: the model that the masks are for; a weight that layers share then counts once. None to count all masks.

    Returns:
        The density, in [0, 1].

    Raises:
        TypeError: with a model, if a mask is not a bool tensor or its module is no Conv2d or Linear.
        ValueError: if the masks have no element, or do not fit the model.

    Examples:
        >>> import torch
        >>> from sparse_adv import masks
        >>> masks.density({"conv": torch.tensor([[True, False], [False, False]])})
        0.25
    """
    if model is not None:
        masks = of_distinct_weights(masks, model)
    total = sum(mask.numel() for mask in masks.values())
    if total == 0:
        raise ValueError(f"masks must have at least one element, got {len(masks)} masks without any")
    return sum(int(mask.count_nonzero()) for mask in masks.values()) / total


def of_distinct_weights(masks: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the masks, but not those of layers that share the weight of an earlier layer.

    Raises:
        TypeError, ValueError: as for `masks_by_module`.
    """
    masks_by_module(model, masks)
    owner = owners({name: model.get_submodule(name) for name in masks})
    return {name: mask for name, mask in masks.items() if owner[name] == name}


@checks_types
def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Return the normalised Hamming distance of two sets of masks: the fraction of elements that differ.

    Early-Bird tickets end a search when this distance between masks of successive epochs is below 0.1.

    Args:
        a, b: bool masks keyed by module name, with the same names and shapes.

    Returns:
        The distance, in [0, 1].

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
