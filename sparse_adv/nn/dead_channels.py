"""Dead BatchNorm channels, those fed only by fully pruned filters: find them, zero gamma and beta, keep them zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from sparse_adv.argument_types import checks_types
from sparse_adv.masks.layers import masks_by_module, run_once
from sparse_adv.nn import optimizer_hook

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


@checks_types
def dead_channels(
    model: nn.Module, masks: Mapping[str, Tensor], example_input: Sequence[int] | Tensor
) -> dict[str, Tensor]:
    """Find the BatchNorm channels whose input is always the same: the output of a filter without any kept weight.

    That output is the filter's bias, or 0 without one.

    A BatchNorm2d (or SyncBatchNorm) with gamma and beta counts only if its input is always the very tensor that a
    masked convolution without forward hooks returned, with nothing added in between. A BatchNorm after a residual sum
    never counts, because the other summand may vary.

    Args:
        model: any model, dense or sparse; it runs one forward pass, in eval mode.
        masks: bool masks keyed by module name, as `masks.prune` returns them; masks of linear layers are ignored.
        example_input: a batch of the model's input, or the shape [N, C, H, W] of one.

    Returns:
        For each BatchNorm that counts, by module name, a bool tensor [C]: true = dead.

    Raises:
        TypeError: if a mask is not a bool tensor, or is for a module that is no Conv2d or Linear.
        ValueError: if a mask's name is unknown, or its shape is not the weight's.

    Source: Li et al., "Towards Practical Lottery Ticket Hypothesis for Adversarial Training" (arXiv 2003.05733). The
    paper does not mention BatchNorm; its code pairs each BatchNorm with the convolution before it in module order.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2))
        >>> mask = torch.ones(2, 1, 3, 3, dtype=torch.bool)
        >>> mask[1] = False
        >>> dead_channels(model, {"0": mask}, (1, 1, 5, 5))
        {'1': tensor([False,  True])}
    """
    filters = _dead_filters(model, masks)
    norms = ((name, m) for name, m in model.named_modules() if isinstance(m, _NORMS) and m.affine)
    names: dict[nn.Module, str] = {norm: name for name, norm in norms}
    outputs = WeakTensorKeyDictionary()
    """Maps each tensor that a masked convolution returned to its dead channels and the tensor's version."""
    dead_of: dict[nn.Module, Tensor] = {}
    fed_otherwise: set[nn.Module] = set()

    def visit_convolution(layer: nn.Conv2d, input: Tensor, output: Tensor) -> None:
        if layer in filters:
            outputs[output] = filters[layer], output._version

    def visit_norm(norm: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        input = args[0] if args else kwargs["input"]
        dead, version = outputs.get(input, (None, 0))
        if dead is None or input._version != version:  # another version: the tensor was changed in place
            fed_otherwise.add(norm)
        else:
            dead_of[norm] = dead_of.get(norm, dead) & dead

    handles = [norm.register_forward_pre_hook(visit_norm, with_kwargs=True) for norm in names]
    try:
        run_once(model, example_input, visit_convolution)
    finally:
        for handle in handles:
            handle.remove()
    return {names[norm]: dead for norm, dead in dead_of.items() if norm not in fed_otherwise}


@checks_types
def zero_dead_channels(
    model: nn.Module, masks: Mapping[str, Tensor], example_input: Sequence[int] | Tensor
) -> dict[str, int]:
    """Set gamma and beta of the dead channels to 0, and keep them there under training.

    A dead channel outputs a constant, in training mode beta. After this call it outputs 0, and neither gradient,
    momentum nor weight decay changes that, also with DistributedDataParallel. Running statistics stay as they are. Call
    it again after new masks or loaded weights: channels that are no longer dead are then trained again, from their
    present values. After `densify`, all channels are. `deepcopy` and `pickle` do not copy the hooks that keep the
    zeros: call it on a copy that is to be trained.

    Args:
        model, masks, example_input: as for `dead_channels`.

    Returns:
        For each BatchNorm that counts (see `dead_channels`), by module name, the number of its dead channels.

    Raises:
        TypeError, ValueError: as for `dead_channels`.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2))
        >>> mask = torch.ones(2, 1, 3, 3, dtype=torch.bool)
        >>> mask[1] = False
        >>> zero_dead_channels(model, {"0": mask}, (1, 1, 5, 5))
        {'1': 1}
        >>> model[1].weight.tolist()
        [1.0, 0.0]
    """
    dead = dead_channels(model, masks, example_input)
    release_channels(model)
    for name, channels in dead.items():
        if channels.any():
            for parameter in model.get_submodule(name).parameters(recurse=False):
                _keep_zero(parameter, channels.to(parameter.device))
    return {name: int(channels.count_nonzero()) for name, channels in dead.items()}


def release_channels(model: nn.Module) -> None:
    """Let training change all channels again, from their present values."""
    for module in model.modules():
        if isinstance(module, _NORMS):
            for parameter in module.parameters(recurse=False):
                optimizer_hook.unwatch(parameter)


@checks_types
def revive_dead_channels(model: nn.Module) -> None:
    """Let training change the channels that `zero_dead_channels` keeps at 0, from gamma 1 and beta 0.01.

    This is for networks whose filters may get weights again. These start at 0, and neither a gamma of 0 nor a ReLU
    whose input is 0 everywhere passes them a gradient. So gamma is 1, and beta a little more than 0.

    Args:
        model: changed in place.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2))
        >>> _ = zero_dead_channels(model, {"0": torch.zeros(2, 1, 3, 3, dtype=torch.bool)}, (1, 1, 5, 5))
        >>> revive_dead_channels(model)
        >>> model[1].weight.tolist(), [round(beta, 2) for beta in model[1].bias.tolist()]
        ([1.0, 1.0], [0.01, 0.01])
    """
    for module in model.modules():
        if isinstance(module, _NORMS) and module.affine:
            alive = optimizer_hook.mask_of(module.weight)
            if alive is not None:
                for parameter, value in ((module.weight, 1), (module.bias, 0.01)):
                    optimizer_hook.unwatch(parameter)
                    with torch.no_grad():
                        parameter.masked_fill_(~alive, value)


def _dead_filters(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[nn.Module, Tensor]:
    """The output channels of each masked convolution that are the same for all inputs."""
    filters: dict[nn.Module, Tensor] = {}
    for layer, mask in masks_by_module(model, masks).items():
        if not isinstance(layer, nn.Conv2d) or layer._forward_hooks:  # a hook may change its output
            continue
        filters[layer] = ~mask.flatten(1).any(1)
    return filters


def _keep_zero(parameter: nn.Parameter, dead: Tensor) -> None:
    with torch.no_grad():
        parameter.masked_fill_(dead, 0)
    optimizer_hook.watch(parameter, ~dead)
