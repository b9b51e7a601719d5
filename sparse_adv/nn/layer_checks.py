"""Which layers can be masked, and whether a mask fits a weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparse_adv.masks.layers import computes_as, own_methods


def check_own_parameters(layer: nn.Module) -> None:
    """Raises TypeError if weight or bias is not a Parameter of this layer."""
    for name in ("weight", "bias"):
        if name not in layer._parameters:
            raise TypeError(
                f"{name} is computed from something else (nn.utils.prune or parametrize): make that "
                "permanent, after taking its masks, if it has any, by masks.from_state_dict(model.state_dict())"
            )


def check_replaceable(layer: nn.Module) -> None:
    """Raises TypeError if another layer cannot take over the state of this one."""
    check_own_parameters(layer)
    if own := own_methods(layer):  # it would still call this layer
        what = f"a {min(own)} that was set on this {type(layer).__name__}"
        raise TypeError(f"{what} computes its output: remove that first")


def check_plain(layer: nn.Module, kind: type[nn.Module]) -> None:
    """Raises TypeError if a masked layer would compute something else than this layer, or cannot take over its state.

    Args:
        layer: a layer, not masked.
        kind: nn.Conv2d or nn.Linear, whose output that of the masked layer is.
    """
    check_replaceable(layer)
    if not computes_as(layer, kind):
        name = type(layer).__name__
        raise TypeError(f"{name} computes its output in its own way, only plain {kind.__name__} layers can be masked")


def check_shape(mask: Tensor, weight: Tensor) -> None:
    """Raises ValueError if the mask is for a weight of another shape."""
    if mask.shape != weight.shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, weight has shape {tuple(weight.shape)}")


def check_values(mask: Tensor, weight: Tensor) -> None:
    """Raises ValueError if the mask has no values for a weight that has some."""
    if mask.is_meta and not weight.is_meta:
        raise ValueError(f"mask is on the meta device and has no values, weight is on {weight.device}")


def check_writable(weight: Tensor) -> None:
    """Raises ValueError if pruned entries of the weight and of its gradient cannot be zeroed where it is called.

    PyTorch raises in the write itself, which may be after another layer's.
    """
    for name, tensor in (("weight", weight), ("weight.grad", weight.grad)):
        if tensor is not None and tensor.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(f"{name} is an inference tensor, which takes a mask inside of torch.inference_mode only")
