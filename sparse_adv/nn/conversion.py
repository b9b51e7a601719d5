"""Dense model to sparse model and back; and the state between two optimiser steps in which weights stand still."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from sparse_adv.masks import largest_block
from sparse_adv.masks.layers import Layer, unknown_module
from sparse_adv.nn import optimizer_hook
from sparse_adv.nn.masked_conv2d import MaskedConv2d, check_convertible, pattern_of
from sparse_adv.nn.masked_layer import MaskedLayer
from sparse_adv.nn.masked_linear import MaskedLinear, check_linear, check_linear_mask
from sparse_adv.ops.masked_conv2d_mask import check_block, check_mask, obeys


class _Plan(NamedTuple):
    layer: Layer
    mask: Tensor
    convert: Callable[[], MaskedLayer]


def sparsify(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    block: Sequence[int] | None = None,
    optimizer: Optimizer | None = None,
) -> nn.Module:
    """Replace convolutions of the model by `MaskedConv2d` and linear layers by `MaskedLinear`, in place.

    Layers that are masked already get the new masks. Parameter objects stay the same, so an optimiser made before goes
    on working. If anything is wrong, nothing changes.

    Args:
        model: any module.
        masks: bool masks keyed by module name, as `masks.prune` returns them; layers without a mask stay dense.
        block: the block shape of all masks; None finds for each the largest supported block that it obeys.
        optimizer: its momentum (and whatever else it keeps) of pruned weights becomes 0 now; without it, that happens
            before its next step.

    Returns:
        The model; if that is itself a Conv2d or Linear (its mask's name is ""), the layer that replaces it.

    Raises:
        TypeError: if a named module is not a plain Conv2d or Linear, or a mask no bool tensor.
        ValueError: if a name is unknown, a mask has the wrong shape or disobeys the block, or one weight would need
            two masks.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    plans: dict[nn.Module, _Plan] = {}
    for name, mask in masks.items():
        if name not in modules:
            raise ValueError(unknown_module(name, modules))
        known = plans.get(modules[name])
        if known is not None and not mask.equal(known.mask):
            raise ValueError(f"module {name!r} has another name with another mask")
        try:
            plans[modules[name]] = known or _plan(modules[name], mask, block)
        except (TypeError, ValueError) as error:
            raise type(error)(f"module {name!r}: {error}") from error
    _refuse_divided_weights(modules, plans)

    layers = {module: plan.convert() for module, plan in plans.items()}
    model = _replace(model, modules, layers)
    if optimizer is not None:
        optimizer_hook.settle(optimizer)
    return model


def densify(model: nn.Module) -> nn.Module:
    """Replace every masked layer by a plain `nn.Conv2d` or `nn.Linear` with the same Parameters, zeros where pruned.

    It happens in place. The model's `state_dict` is then what the dense model would save, and nothing keeps the zeros
    any longer.

    Returns:
        The model; if that is itself a masked layer, the layer that replaces it.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    return _replace(model, modules, {m: m.to_dense() for m in model.modules() if isinstance(m, MaskedLayer)})


@contextmanager
def constant_weights(model: nn.Module) -> Iterator[nn.Module]:
    """While this lasts, the masked layers' weights and biases must not change, and passes profit from it.

    Each layer reads its kept values once, in the kernels' order (float32 convolutions on the CPU), and forms no
    gradient of weight or bias, whatever `requires_grad` says: what an attack needs. May be nested; ends with the
    outermost.
    """
    held = [layer for layer in model.modules() if isinstance(layer, MaskedLayer) and layer.hold_constant()]
    try:
        yield model
    finally:
        for layer in held:
            layer.release_constant()


def _plan(module: nn.Module, mask: Tensor, block: Sequence[int] | None) -> _Plan:
    if isinstance(module, nn.Linear):
        check_linear(module)
        check_linear_mask(module, mask)
        if block is not None and not obeys(mask, block):
            raise ValueError(f"mask does not obey block {check_block(block)}")
        return _Plan(module, mask, partial(MaskedLinear.around, module, mask))
    if not isinstance(module, nn.Conv2d):
        raise TypeError(f"only Conv2d and Linear layers can be masked, got {type(module).__name__}")
    check_convertible(module)
    check_mask(mask)
    block4 = largest_block(mask) if block is None else check_block(block)
    return _Plan(module, mask, partial(MaskedConv2d.around, module, mask, block4, pattern_of(module, mask, block4)))


def _refuse_divided_weights(modules: Mapping[str, nn.Module], plans: Mapping[nn.Module, _Plan]) -> None:
    """A Parameter that several modules share must get the same mask from all."""
    masked = {id(plan.layer.weight): plan.mask for plan in plans.values()}
    for name, module in modules.items():
        for parameter in module.parameters(recurse=False):
            wanted = masked.get(id(parameter))
            if wanted is not None and not (module in plans and plans[module].mask.equal(wanted)):
                raise ValueError(f"the weight of module {name!r} is also another's, and the two do not get one mask")


def _replace(model: nn.Module, modules: Mapping[str, nn.Module], new: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put each new layer in the place of the old one, under all its names."""
    for name, module in modules.items():
        if module in new and name:
            parent, _, child = name.rpartition(".")
            setattr(modules[parent], child, new[module])
    if model in new:
        return new[model]
    _tell_ddp(model)
    return model


def _tell_ddp(model: nn.Module) -> None:
    """DistributedDataParallel would broadcast the masks with every step; they are the same everywhere already."""
    own = {f"{name}.weight_mask" for name, module in model.named_modules() if isinstance(module, MaskedLayer)}
    others = [
        name for name in getattr(model, "_ddp_params_and_buffers_to_ignore", []) if not name.endswith("weight_mask")
    ]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*others, *sorted(own)])
