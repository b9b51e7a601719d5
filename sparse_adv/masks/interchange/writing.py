"""`save_pruned`: writes masks and weights to files that can be read without this library."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from sparse_adv.argument_types import checks_types
from sparse_adv.files import write_bytes
from sparse_adv.masks.layers import parameter_of
from sparse_adv.masks.ticket import check_masks_fit, independent_copies, of_dense_model

_FORMATS = ("dense", "prune")
_TORCH_SUFFIXES = (".pt", ".pth")


@checks_types
def save_pruned(
    path: str | os.PathLike[str],
    masks: Mapping[str, Tensor],
    state_dict: Mapping[str, Tensor],
    format: str = "dense",
) -> None:
    """Write a pruned model as a state dict that loads without this library; an existing file is replaced.

    Args:
        path: the file; its suffix decides the container: `.safetensors`, or `.pt` or `.pth` for torch.save.
        masks: bool masks keyed by module name.
        state_dict: of the dense or the sparse model; it must have the weight of each mask.
        format: "dense": a state dict for the dense model, with zeros where pruned. "prune": a state dict for a model
            with `torch.nn.utils.prune` applied to these weights: `X.weight_orig`, as in `state_dict`, and
            `X.weight_mask`.

    Raises:
        TypeError: if a mask is not a bool tensor.
        ValueError: if suffix or format is unknown, a mask has no weight of its shape in `state_dict`, or `state_dict`
            is of a sparse model with other masks.

    Examples:
        >>> import tempfile
        >>> from torch import nn
        >>> from sparse_adv import masks
        >>> model = nn.Conv2d(3, 8, 3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     masks.save_pruned(f"{folder}/model.pt", masks.prune(model, 0.5), model.state_dict(), format="prune")
        ...     masks.load_pruned(f"{folder}/model.pt").provenance["format"]
        'prune'
    """
    path = Path(path)
    if path.suffix not in (".safetensors", *_TORCH_SUFFIXES):
        raise ValueError(f"path must end in .safetensors, {' or '.join(_TORCH_SUFFIXES)}, got {path.name!r}")
    if format not in _FORMATS:
        raise ValueError(f"format must be one of {', '.join(_FORMATS)}, got {format!r}")
    check_masks_fit(masks, state_dict)
    masks = _under_all_names(masks, state_dict)
    tensors = independent_copies(of_dense_model(masks, state_dict))
    for name, mask in masks.items():
        key = parameter_of(name)
        if format == "dense":
            tensors[key] = torch.where(mask.cpu(), tensors[key], 0).contiguous()
        else:
            tensors[f"{key}_orig"] = tensors.pop(key)
            tensors[f"{key}_mask"] = mask.cpu().to(tensors[f"{key}_orig"].dtype).contiguous()
    if path.suffix in _TORCH_SUFFIXES:
        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        write_bytes(path, buffer.getvalue())
    else:
        write_bytes(path, save(tensors, {"format": "pt"}))


def _under_all_names(masks: Mapping[str, Tensor], state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks, also for other names of the same weights: a module may have several names."""
    places = {_place(state_dict[parameter_of(name)]): mask for name, mask in masks.items() if mask.numel()}
    others = {key.rpartition(".")[0]: _place(value) for key, value in state_dict.items() if key.endswith(".weight")}
    return {name: places[place] for name, place in others.items() if place in places} | dict(masks)


def _place(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()
