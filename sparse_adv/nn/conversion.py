"""Dense model to sparse model and back; and the state between two optimiser steps in which weights stand still."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from sparse_adv.masks import largest_block
from sparse_adv.masks.convolutions import unknown_module
from sparse_adv.nn import optimizer_guard
from sparse_adv.nn.masked_conv2d import MaskedConv2d, check_convertible, pattern_of
from sparse_adv.ops import Pattern
from sparse_adv.ops.pattern import check_block, check_mask


class _Plan(NamedTuple):
    layer: nn.Conv2d
    mask: Tensor
    block: tuple[int, int, int, int]
    pattern: Pattern


def sparsify(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    block: Sequence[int] | None = None,
    optimizer: Optimizer | None = None,
) -> nn.Module:
    """Replace convolutions of the model by `MaskedConv2d`, in place; give new masks to those that are masked already.

    Parameter objects stay the same, so an optimiser made before goes on working. If anything is wrong, nothing changes.

    Args:
        model: any module.
        masks: bool masks keyed by module name, as `masks.prune` returns them; layers without a mask stay dense.
        block: the block shape of all masks; None finds for each the largest supported block that it obeys.
        optimizer: its momentum (and whatever else it keeps) of pruned weights becomes 0 now; without it, that happens
            before its next step.

    Returns:
        The model; if that is itself a Conv2d (its mask's name is ""), the layer that replaces it.

    Raises:
        TypeError: if a named module is not a plain Conv2d, or a mask no bool tensor.
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

    layers = {module: MaskedConv2d.around(*plan) for module, plan in plans.items()}
    model = _replace(model, modules, layers)
    if optimizer is not None:
        optimizer_guard.settle(optimizer)
    return model


def densify(model: nn.Module) -> nn.Module:
    """Replace every `MaskedConv2d` by a plain `nn.Conv2d` with the same Parameters, zeros where pruned, in place.

    Its `state_dict` is then what the dense model would save, and nothing keeps the zeros any longer.

    Returns:
        The model; if that is itself a `MaskedConv2d`, the layer that replaces it.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    return _replace(model, modules, {m: m.to_dense() for m in model.modules() if isinstance(m, MaskedConv2d)})


@contextmanager
def constant_weights(model: nn.Module) -> Iterator[nn.Module]:
    """While this lasts, the masked layers' weights and biases must not change, and passes profit from it.

    Each layer reads its kept values once, in the kernels' order (float32 on the CPU), and forms no gradient of weight
    or bias, whatever `requires_grad` says: what an attack needs. May be nested; ends with the outermost.
    """
    held = [layer for layer in model.modules() if isinstance(layer, MaskedConv2d) and layer.hold_constant()]
    try:
        yield model
    finally:
        for layer in held:
            layer.release_constant()


def _plan(module: nn.Module, mask: Tensor, block: Sequence[int] | None) -> _Plan:
    check_convertible(module)
    assert isinstance(module, nn.Conv2d)
    check_mask(mask)
    block4 = largest_block(mask) if block is None else check_block(block)
    return _Plan(module, mask, block4, pattern_of(module, mask, block4))


def _refuse_divided_weights(modules: Mapping[str, nn.Module], plans: Mapping[nn.Module, _Plan]) -> None:
    """A Parameter that several modules share must get the same mask from all."""
    masked = {id(plan.layer.weight): plan.mask for plan in plans.values()}
    for name, module in modules.items():
        for parameter in module.parameters(recurse=False):
            wanted = masked.get(id(parameter))
            if wanted is not None and not (module in plans and plans[module].mask.equal(wanted)):
                raise ValueError(f"the weight of module {name!r} is also another's, and the two do not get one mask")


def _replace(model: nn.Module, modules: Mapping[str, nn.Module], new: Mapping[nn.Module, nn.Conv2d]) -> nn.Module:
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
    own = {f"{name}.weight_mask" for name, module in model.named_modules() if isinstance(module, MaskedConv2d)}
    others = [
        name for name in getattr(model, "_ddp_params_and_buffers_to_ignore", []) if not name.endswith("weight_mask")
    ]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*others, *sorted(own)])
