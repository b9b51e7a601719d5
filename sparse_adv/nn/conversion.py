"""Conversion of a dense model to a sparse one and back, and a context in which weights do not change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from sparse_adv.argument_types import checks_types
from sparse_adv.masks.layers import Layer, is_same_mask, masks_by_module, modules_by_name, naming
from sparse_adv.nn import optimizer_hook
from sparse_adv.nn.dead_channels import release_channels
from sparse_adv.nn.layer_checks import check_replaceable
from sparse_adv.nn.masked_conv2d import MaskedConv2d, check_conv_mask, check_convertible, compile_mask
from sparse_adv.nn.masked_layer import MaskedLayer, masked_layers
from sparse_adv.nn.masked_linear import MaskedLinear, check_linear, check_linear_mask
from sparse_adv.ops.masked_conv2d_mask import check_block, check_obeys


class _Conversion(NamedTuple):
    """A layer whose mask has been checked and compiled."""

    layer: Layer
    mask: Tensor
    convert: Callable[[], MaskedLayer]


@checks_types
def sparsify(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    block: Sequence[int] | None = None,
    optimizer: Optimizer | None = None,
) -> nn.Module:
    """Replace convolutions of the model by `MaskedConv2d` and linear layers by `MaskedLinear`, in place.

    Layers that are masked already get the new masks. Parameter objects stay the same, so an optimiser made before still
    works; a layer that was compiled by itself, `layer.compile()`, must be compiled again. If anything is wrong, nothing
    changes.

    Args:
        model: any module.
        masks: bool masks keyed by module name, as `masks.prune` returns them; layers without a mask stay dense.
        block: the block shape of all masks; None finds the largest supported block that each mask obeys.
        optimizer: its momentum (and whatever else it stores) for pruned weights becomes 0 now; without it, that happens
            before its next step.

    Returns:
        The model; if that is itself a Conv2d or Linear (its mask's name is ""), the layer that replaces it.

    Raises:
        TypeError: if a named module is not a plain Conv2d or Linear, or a mask is not a bool tensor.
        ValueError: if a name is unknown, a mask has the wrong shape or disobeys the block, one weight would need two
            masks, or a weight was made in `torch.inference_mode` and this is outside of it.

    Examples:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3))
        >>> sparsify(model, {"0": torch.rand(8, 3, 3, 3) < 0.1})[0].density < 0.3
        True
    """
    modules = modules_by_name(model, masks)
    conversions: dict[nn.Module, _Conversion] = {}

    def check(layer: Layer, mask: Tensor) -> None:
        conversions[layer] = _conversion(layer, mask, block)

    masks_by_module(model, masks, check)
    _check_shared_weights(modules, conversions)

    layers = {module: conversion.convert() for module, conversion in conversions.items()}
    model = _replace(model, modules, layers)
    if optimizer is not None:
        optimizer_hook.settle(optimizer)
    return model


@checks_types
def densify(model: nn.Module) -> nn.Module:
    """Replace every masked layer by a plain `nn.Conv2d` or `nn.Linear` with the same Parameters, zeros where pruned.

    The model is changed in place. Its `state_dict` then has the dense model's keys, and training may change the weights
    that were pruned and the BatchNorm channels that `zero_dead_channels` keeps at 0. Call `revive_dead_channels`
    before, because a ReLU passes no gradient to a channel that is 0 everywhere. A layer that was compiled by itself,
    `layer.compile()`, must be compiled again. If anything is wrong, nothing changes.

    Args:
        model: any module, sparse or dense.

    Returns:
        The model; if that is itself a masked layer, the layer that replaces it.

    Raises:
        TypeError: if weight or bias of a masked layer is parametrized, or a `forward` was set on it.

    Examples:
        >>> import torch
        >>> layer = sparsify(nn.Linear(2, 1), {"": torch.tensor([[True, False]])})
        >>> type(densify(layer)) is nn.Linear
        True
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    masked = {name: module for name, module in modules.items() if isinstance(module, MaskedLayer)}
    for name, layer in masked.items():
        with naming(name):
            check_replaceable(layer)
    release_channels(model)
    return _replace(model, modules, {layer: layer.to_dense() for layer in set(masked.values())})


@checks_types
@contextmanager
def frozen_weights(model: nn.Module) -> Iterator[nn.Module]:
    """A context in which the masked layers' weights and biases must not change, which makes passes faster.

    Each layer reads the weights kept by its mask once, in the kernels' order (float32 convolutions on the CPU, blocks
    on CUDA), casts them once under autocast, and computes no gradient of weight or bias, whatever `requires_grad` says.
    That is what an attack needs. Contexts may be nested; the outermost one ends the effect. A context holds for the
    thread that entered it, so another thread can train the same model; compiled code ignores it. Code under
    `torch.utils.checkpoint` is computed again by the thread that runs the backward pass. On CUDA that is a thread of
    autograd, for which the weights are not frozen; with `use_reentrant=False` PyTorch then raises a CheckpointError.

    Args:
        model: any module.

    Returns:
        A context manager that yields the model.

    Examples:
        >>> import torch
        >>> model = sparsify(nn.Sequential(nn.Conv2d(3, 8, 3)), {"0": torch.rand(8, 3, 3, 3) < 0.1})
        >>> with frozen_weights(model):
        ...     model(torch.rand(1, 3, 8, 8)).requires_grad
        False
    """
    layers: list[MaskedLayer] = []
    try:
        for layer in masked_layers(model).values():
            if layer.freeze():
                layers.append(layer)
        yield model
    finally:
        for layer in layers:
            layer.unfreeze()


def _conversion(module: Layer, mask: Tensor, block: Sequence[int] | None) -> _Conversion:
    """Check a mask for a module and compile it; the module stays as it is."""
    if isinstance(module, nn.Linear):
        check_linear(module)
        check_linear_mask(module, mask)
        if block is not None:
            block4 = check_block(block)
            if not mask.is_meta:
                check_obeys(mask, block4)
        return _Conversion(module, mask, partial(MaskedLinear.from_checked, module, mask))
    check_convertible(module)
    block4 = check_conv_mask(module, mask, block)
    compiled = compile_mask(module, mask, block4)
    return _Conversion(module, mask, partial(MaskedConv2d.from_compiled, module, mask, block4, compiled))


def _check_shared_weights(modules: Mapping[str, nn.Module], conversions: Mapping[nn.Module, _Conversion]) -> None:
    """Raises ValueError unless modules that share a Parameter all get the same mask."""
    masks = {id(conversion.layer.weight): conversion.mask for conversion in conversions.values()}
    for name, module in modules.items():
        for parameter in module.parameters(recurse=False):
            mask = masks.get(id(parameter))
            if mask is not None and not (module in conversions and is_same_mask(conversions[module].mask, mask)):
                raise ValueError(f"module {name!r} shares its weight with a module that gets another mask, or none")


def _replace(model: nn.Module, modules: Mapping[str, nn.Module], new: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put each new layer in the place of the old one, under all its names."""
    for name, module in modules.items():
        if module in new and name:
            parent, _, child = name.rpartition(".")
            setattr(new.get(modules[parent], modules[parent]), child, new[module])
    if model in new:
        return new[model]
    _ignore_masks_in_ddp(model)
    return model


def _ignore_masks_in_ddp(model: nn.Module) -> None:
    """Exclude the masks from DistributedDataParallel's broadcast in every step: all processes have them."""
    own = {f"{name}.weight_mask" for name in masked_layers(model)}
    others = [
        name for name in getattr(model, "_ddp_params_and_buffers_to_ignore", []) if not name.endswith("weight_mask")
    ]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*others, *sorted(own)])
