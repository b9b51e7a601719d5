"""The masks that a method starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from sparse_adv import masks
from sparse_adv.argument_types import checks_types
from sparse_adv.config import MethodConfig
from sparse_adv.masks.blocks import conv_shape, grid_shape
from sparse_adv.nn import sparsify
from sparse_adv.ops.masked_conv2d_mask import check_block, expand_blocks
from sparse_adv.training.random_numbers import Stream, generator


def check_method(config: MethodConfig) -> None:
    """Raise ValueError if a configuration names no method."""
    if config.method == "none":
        raise ValueError("method must name a method, got 'none'")


@checks_types
def random_masks(model: nn.Module, config: MethodConfig, seed: int) -> dict[str, Tensor]:
    """Return masks of random blocks at the density of a configuration.

    Args:
        model: dense.
        config: gives density, block, scope and `linear`; `masks.prune` explains and validates them.
        seed: of the choice.

    Returns:
        bool masks by module name.

    Raises:
        ValueError: if the configuration does not fit the model.

    Examples:
        >>> config = MethodConfig("static", density=0.25, block=(2, 2))
        >>> masks.density(random_masks(nn.Sequential(nn.Linear(8, 8)), config, seed=0))
        0.25
    """
    random = generator(seed, Stream.MASKS)
    config = config.resolved()
    assert config.scope is not None
    return masks.prune(
        model,
        config.density,
        config.block,
        scope=config.scope,
        score=lambda name, weight: _random_blocks(weight.shape, config.block, random),
        linear=config.linear,
    )


@checks_types
def start(model: nn.Module, config: MethodConfig, seed: int) -> nn.Module:
    """Give a dense model, in place, the masks that a method starts from.

    They are random, or keep everything if the method prunes later (gmp, or with `dense_epochs`).

    Args:
        model: dense, with its initial weights.
        config: of the method; with `rescale_init` the kept weights are scaled so that the variance of each layer's
            output does not change.
        seed: of the random masks.

    Returns:
        The model.

    Raises:
        ValueError: if the configuration names no method, or does not fit the model.

    Source: Evci et al., "Gradient flow in sparse neural networks and how lottery tickets win" (AAAI 2022), section 3.1,
    for the rescaled weights.

    Examples:
        >>> start(nn.Sequential(nn.Linear(8, 8)), MethodConfig("rigl", density=0.5), seed=0)[0].density
        0.5
    """
    check_method(config)
    starts_dense = config.method == "gmp" or config.dense_epochs > 0
    chosen = random_masks(model, replace(config, density=1.0) if starts_dense else config, seed)
    if config.rescale_init and not starts_dense:
        masks_of_weights = {_weight(model, name): mask for name, mask in chosen.items()}  # a shared weight counts once
        with torch.no_grad():
            for weight, mask in masks_of_weights.items():
                weight.mul_(_gain(mask).to(weight.dtype))
    sparsify(model, chosen, config.block)
    return model


def _random_blocks(shape: torch.Size, block: Sequence[int], random: torch.Generator) -> Tensor:
    """A number for each block, repeated for its weights, so that the smaller blocks at an edge are kept as often as
    others."""
    block = check_block(block)
    numbers = torch.rand(grid_shape(conv_shape(shape), block), generator=random, device="cpu")
    return expand_blocks(numbers, block, conv_shape(shape)).reshape(shape)


def _weight(model: nn.Module, name: str) -> Tensor:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight


def _gain(mask: Tensor) -> Tensor:
    """The root of (weights / kept weights) of each output channel; 1 for a channel without any."""
    inputs = tuple(range(1, mask.dim()))
    kept = mask.sum(inputs, keepdim=True)
    return torch.where(kept > 0, mask[0].numel() / kept.clamp(min=1), 1.0).sqrt()
