"""Which layers can be masked, and whether a mask fits a weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparse_adv.masks.layers import check_whole, computes_as, is_sharded, own_methods
from sparse_adv.ops.masked_conv2d_mask import check_shape
from sparse_adv.ops.transforms import is_transformed


def has_values(weight: Tensor) -> bool:
    """Whether the whole weight is in memory: FSDP2 leaves a part of it in a DTensor, FSDP1 a view of freed memory."""
    if type(weight) not in (Tensor, nn.Parameter) or weight.is_meta:
        return False
    if is_transformed():  # then a tensor cannot tell about its storage
        return True
    steps = zip(weight.shape, weight.stride(), strict=True)
    last = weight.storage_offset() + sum((size - 1) * step for size, step in steps)
    return not weight.numel() or weight.untyped_storage().nbytes() > last * weight.element_size()


def check_own_parameters(layer: nn.Module) -> None:
    """Raises TypeError if weight or bias is not a Parameter of this layer."""
    check_whole(layer)
    for name in ("weight", "bias"):
        if name not in layer._parameters:
            raise TypeError(
                f"{name} is computed from something else (nn.utils.prune or parametrize): make that "
                "permanent, after taking its masks, if it has any, by masks.from_state_dict(model.state_dict())"
            )


def check_replaceable(layer: nn.Module) -> None:
    """Raises TypeError if another layer cannot take over the state of this one."""
    check_own_parameters(layer)
    if own := own_methods(layer):  # they would still call this layer
        what = f"a {min(own)} that was set on this {type(layer).__name__}"
        raise TypeError(f"{what} computes its output: remove that first")


def check_plain(layer: nn.Module, kind: type[nn.Module]) -> None:
    """Raises TypeError if a masked layer would compute something else than this layer or cannot take over its state.

    Args:
        layer: a layer, not masked.
        kind: nn.Conv2d or nn.Linear, the class whose output the masked layer computes.
    """
    check_replaceable(layer)
    if not computes_as(layer, kind):
        name = type(layer).__name__
        raise TypeError(f"{name} computes its output in its own way, only plain {kind.__name__} layers can be masked")


def check_parameter(mask: Tensor, weight: Tensor, layer: nn.Module) -> None:
    """Raises ValueError if a new Parameter for a masked layer has another shape than its mask."""
    if mask.shape != weight.shape and is_sharded(layer):
        raise ValueError(
            f"weight must have the mask's shape {tuple(mask.shape)}, got its shard of shape {tuple(weight.shape)}: "
            "FSDP(use_orig_params=True) cannot shard masked layers, use_orig_params=False can"
        )
    check_shape(mask, weight)


def check_values(mask: Tensor, weight: Tensor) -> None:
    """Raises ValueError if the mask has no values for a weight that has some."""
    if mask.is_meta and not weight.is_meta:
        raise ValueError(f"mask is on the meta device and has no values, weight is on {weight.device}")


def check_writable(weight: Tensor) -> None:
    """Raises ValueError if pruned entries of the weight and of its gradient cannot be zeroed here.

    PyTorch itself raises only when it writes, when other layers may have been changed already.
    """
    for name, tensor in (("weight", weight), ("weight.grad", weight.grad)):
        if tensor is not None and tensor.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(f"{name} is an inference tensor, which takes a mask inside of torch.inference_mode only")
