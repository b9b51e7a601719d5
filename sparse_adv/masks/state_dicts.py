"""Masks out of state dicts that other tools, or this library, wrote."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def from_state_dict(
    state_dict: Mapping[str, Tensor], infer_zeros: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a pruned model's state dict into masks and a plain dense state dict.

    Reads what `torch.nn.utils.prune` writes (`X.weight_orig`, `X.weight_mask`; any parameter may be pruned) and what
    `MaskedConv2d` writes (`X.weight`, `X.weight_mask`).

    Args:
        state_dict: tensors by name.
        infer_zeros: whether zeros in an unmasked four-dimensional `X.weight` count as pruned.

    Returns:
        The masks of all four-dimensional weights, keyed by module name; and the state dict as the dense model would
        have it, with `weight * mask`, pruned entries 0 whatever they held.

    Raises:
        ValueError: if a mask has no parameter, or another shape.
    """
    masks: dict[str, Tensor] = {}
    dense = {key: value for key, value in state_dict.items() if not _belongs_to_mask(key, state_dict)}
    for key, value in state_dict.items():
        if not _is_mask(key):
            continue
        parameter = key.removesuffix("_mask")
        source = f"{parameter}_orig" if f"{parameter}_orig" in state_dict else parameter
        if source not in state_dict:
            raise ValueError(f"state_dict has {key!r} but neither {parameter!r} nor '{parameter}_orig'")
        if value.shape != state_dict[source].shape:
            raise ValueError(
                f"{key!r} has shape {tuple(value.shape)}, {source!r} has {tuple(state_dict[source].shape)}"
            )
        mask = value != 0
        dense[parameter] = torch.where(mask, state_dict[source], 0)
        if _is_convolution_weight(parameter, mask):
            masks[_module_of(parameter)] = mask
    if infer_zeros:
        for key, value in dense.items():
            if _is_convolution_weight(key, value) and _module_of(key) not in masks and not value.all():
                masks[_module_of(key)] = value != 0
    return masks, dense


def _is_mask(key: str) -> bool:
    return key.rpartition(".")[2] in ("weight_mask", "bias_mask")


def _belongs_to_mask(key: str, state_dict: Mapping[str, Tensor]) -> bool:
    return _is_mask(key) or (key.endswith("_orig") and f"{key.removesuffix('_orig')}_mask" in state_dict)


def _is_convolution_weight(key: str, value: Tensor) -> bool:
    return key.rpartition(".")[2] == "weight" and isinstance(value, Tensor) and value.dim() == 4


def _module_of(key: str) -> str:
    return key.rpartition(".")[0]
