"""From anyone's checkpoint to masks and a plain dense state dict."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_adv.masks.algebra import density as density_of
from sparse_adv.masks.interchange.containers import is_npy, read_npy_list, read_tensors, safetensors_metadata
from sparse_adv.masks.interchange.formats import (
    FORMATS,
    Density,
    Split,
    State,
    is_maskable_weight,
    module_of,
    open_lth_parameter,
    recognised,
)
from sparse_adv.masks.layers import parameter_of, unknown_module
from sparse_adv.masks.ticket import TICKET_FORMAT, Ticket, load_ticket

_NESTS = ("state_dict", "model_state_dict", "net", "model")
"""Where checkpoints that hold more than a state dict keep it."""

_PREFIXES = ("module.", "_orig_mod.", "model.")
"""What DataParallel, torch.compile and wrappers put before every name."""

_COUNTED = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.BatchNorm1d)
"""The modules that ticket_robust's list of masks has an entry for."""


def from_state_dict(
    state_dict: Mapping[str, Any], format: str | None = None, density: Density = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a pruned model's state dict, or a checkpoint around it, into masks and a plain dense state dict.

    Args:
        state_dict: tensors by name; or a checkpoint that has them under "state_dict", "model_state_dict", "net" or
            "model". "module.", "model." and "_orig_mod." before every name are dropped, and so is what is no tensor.
        format, density: as for `load_pruned`.

    Returns:
        The masks of all weights of two or four dimensions, keyed by module name; and the state dict as the dense model
        would have it, with `weight * mask`, pruned entries 0 whatever they held.

    Raises:
        ValueError: if there is no mask, or one has no parameter of its shape or other values than 0 and 1.
    """
    state, _ = _without_prefixes(_unnested(state_dict))
    return _masked(_split(state, format, density)[1])


def load_pruned(
    path: str | os.PathLike[str],
    mask_path: str | os.PathLike[str] | None = None,
    *,
    model: nn.Module | None = None,
    density: Density = None,
    format: str | None = None,
    dense: bool = False,
) -> Ticket:
    """Read the masks and weights of a pruned model, whoever wrote them: torch.save's files, safetensors, our tickets.

    The formats, recognised by the keys (`X` stands for a module's name):

    - "prune": `X.weight_orig`, `X.weight_mask` (torch.nn.utils.prune, Lightning's ModelPruning).
    - "parametrize": `X.parametrizations.weight.original`, `.0.mask` (torch.nn.utils.parametrize with a buffer `mask`).
    - "masked": `X.weight`, `X.weight_mask` (`MaskedConv2d`, `MaskedLinear`).
    - "turboprune": `X.weight`, `X.mask`.
    - "open_lth": `model.X.weight`, `mask_X___weight`; or dense weights with OpenLTH's mask file as `mask_path`.
    - "popup_scores": `X.weight`, `X.popup_scores` (HYDRA; HARP, with `X.k_score`); needs `density`.
    - "mask_list": dense weights with a .npy file as `mask_path`, an object array of the masks of all Conv2d, Linear and
      BatchNorm layers in the order of `model.modules()` (ticket_robust, Li et al. 2020); needs `model`. BatchNorm's
      masks apply to gamma and beta; what that code does to biases is left out.
    - "zeros": none of these: zeros in a weight of two or four dimensions are its mask, and without zeros it has none.
    - "ticket": our own file; its weights are the initial ones, not masked.

    Args:
        path: the file; a checkpoint may have the state dict inside, as for `from_state_dict`.
        mask_path: the file of the masks, if they are in another.
        model: the dense or sparse model that the weights are for; prefixes that its own names have are kept then, and
            each mask must have its module and shape.
        density: of "popup_scores", the fraction of its weights that each layer keeps: one number, or numbers by module
            name. With HARP's `k_score`, the global density of which it makes each layer's.
        format: the format, if it is not to be recognised.
        dense: whether a file that masks nothing is welcome too; it has no masks then, and the format "dense".

    Returns:
        Masks, weights (with `weight * mask`) and as provenance "format", "file", "mask_file" and "density"; a ticket's
        own provenance stays.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a file is damaged or asks for more than tensors, nothing masks it, or masks, weights and model
            do not fit together.
    """
    path = Path(path)
    if format == "ticket" or (format is None and safetensors_metadata(path).get("format") == TICKET_FORMAT):
        ticket = load_ticket(path)
        found = Ticket(ticket.masks, ticket.state_dict, {"format": "ticket", "file": str(path)} | ticket.provenance)
    else:
        found = _load(path, None if mask_path is None else Path(mask_path), model, density, format, dense)
    if model is not None:
        _check(found.masks, model, path)
    return found


def _load(
    path: Path, mask_path: Path | None, model: nn.Module | None, density: Density, format: str | None, dense: bool
) -> Ticket:
    checkpoint = read_tensors(path)
    masks = None if mask_path is None else (read_npy_list if is_npy(mask_path) else read_tensors)(mask_path)
    source = {"file": str(path)} | ({} if mask_path is None else {"mask_file": str(mask_path)})
    try:
        state, prefixes = _without_prefixes(_unnested(checkpoint))
        if masks is None:
            name, split = _split(state, format, density, dense)
        elif isinstance(masks, list):
            name, split = "mask_list", Split(_without_masks(state), {})
        else:
            name, split = "open_lth", Split(_without_masks(state), _open_lth_masks(masks))
        if model is not None:
            split = _renamed(split, prefixes, model)
        if isinstance(masks, list):
            split = split._replace(masks=_in_order(masks, model))
        kept, weights = _masked(split)
    except ValueError as error:
        raise ValueError(f"{' with '.join(map(repr, source.values()))}: {error}") from error
    return Ticket(kept, weights, {"format": name, **source, "density": density_of(kept) if kept else None})


def _unnested(loaded: Any) -> State:
    """The tensors of a state dict that may be inside a checkpoint."""
    while isinstance(loaded, Mapping):
        nest = next((key for key in _NESTS if isinstance(loaded.get(key), Mapping)), None)
        if nest is None:
            break
        loaded = loaded[nest]
    if not isinstance(loaded, Mapping):
        raise ValueError(f"there is no state dict, but a {type(loaded).__name__}")
    tensors = {str(key): value.detach() for key, value in loaded.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"there is no state dict, only {', '.join(map(str, loaded)) or 'an empty one'}")
    return tensors


def _without_prefixes(state: State) -> tuple[State, list[str]]:
    """The state dict without what stands before every name, and that."""
    dropped: list[str] = []
    while prefix := next((prefix for prefix in _PREFIXES if all(key.startswith(prefix) for key in state)), None):
        dropped.append(prefix)
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state, dropped


def _renamed(split: Split, prefixes: list[str], model: nn.Module) -> Split:
    """With as much of the prefixes before every name as makes most of them names of the model."""
    modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
    # From none to all; the first of the best.
    candidates = accumulate(reversed(prefixes), lambda inner, outer: outer + inner, initial="")
    prefix = max(candidates, key=lambda p: sum(module_of(p + name) in modules for name in split.parameters))
    return Split(*({prefix + name: value for name, value in part.items()} for part in split))


def _split(state: State, format: str | None, density: Density, dense: bool = False) -> tuple[str, Split]:
    if format is not None and format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    name = format or recognised(state)
    split = FORMATS[name].split(state, density)
    if not split.masks and dense and format is None:
        return "dense", split
    if not split.masks:
        what = f"is nothing of the format {format!r}" if format else "are no masks, and no zeros to take for masks"
        raise ValueError(f"among {len(state)} tensors there {what}")
    return name, split


def _without_masks(state: State) -> State:
    """A state dict whose masks are in another file; raises ValueError if it has masks itself."""
    own = recognised(state)
    if own != "zeros":
        raise ValueError(f"there are masks among the weights, in the format {own!r}: leave mask_path out")
    return state


def _masked(split: Split) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Masks by module name, and the weights under them."""
    masks, weights = {}, dict(split.parameters)
    for name, mask in split.masks.items():
        if name not in weights:
            raise ValueError(f"there is a mask for {name!r}, but no tensor of that name")
        if mask.shape != weights[name].shape:
            raise ValueError(f"the mask of {name!r} has shape {tuple(mask.shape)}, not {tuple(weights[name].shape)}")
        if ((mask != 0) & (mask != 1)).any():
            raise ValueError(f"the mask of {name!r} must hold only 0 and 1, got {_odd_one(mask):g}")
        kept = mask != 0
        weights[name] = torch.where(kept, weights[name], 0)
        if is_maskable_weight(name, kept):
            masks[module_of(name)] = kept
    if split.masks and not masks:
        raise ValueError(f"only {', '.join(split.masks)} are masked, and no weight of a convolution or linear layer")
    return masks, weights


def _odd_one(mask: Tensor) -> float:
    return float(mask[(mask != 0) & (mask != 1)][0])


def _open_lth_masks(loaded: Any) -> State:
    state, _ = _without_prefixes(_unnested(loaded))
    return {open_lth_parameter(key): value for key, value in state.items()}


def _in_order(masks: list[Tensor], model: nn.Module | None) -> State:
    """A list of masks by parameter name: one for each layer in the order of `model.modules()`."""
    if model is None:
        raise ValueError("the masks have no names, so model must be given")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, _COUNTED)}
    if len(masks) != len(layers):
        raise ValueError(
            f"there are {len(masks)} masks, but the model has {len(layers)} Conv2d, Linear and BatchNorm layers"
        )
    named: State = {}
    for (name, layer), mask in zip(layers.items(), masks, strict=True):
        masked = ("weight",) if isinstance(layer, nn.Conv2d | nn.Linear) else ("weight", "bias")
        named |= {parameter_of(name, parameter): mask for parameter in masked}
    return named


def _check(masks: Mapping[str, Tensor], model: nn.Module, path: Path) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, mask in masks.items():
        if name not in modules:
            raise ValueError(f"{str(path)!r} does not fit the model: {unknown_module(name, modules)}")
        weight = getattr(modules[name], "weight", None)
        if not isinstance(weight, Tensor) or weight.shape != mask.shape:
            has = f"a weight of shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else "no weight"
            raise ValueError(
                f"{str(path)!r} does not fit the model: {name!r} has {has}, its mask has {tuple(mask.shape)}"
            )
