"""`load_pruned` and `from_state_dict`: masks and dense state dicts from the checkpoints of other tools."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_adv.argument_types import checks_types, shortened
from sparse_adv.masks.algebra import density as density_of
from sparse_adv.masks.interchange.containers import COMBINE, is_npy, read_npy_list, read_tensors, safetensors_metadata
from sparse_adv.masks.interchange.formats import (
    FORMATS,
    WRAPPERS,
    DividedState,
    GivenDensity,
    StateDict,
    is_maskable_weight,
    masked_parameter,
    module_of,
    recognise,
)
from sparse_adv.masks.layers import maskable, parameter_of, unknown_module
from sparse_adv.masks.ticket import TICKET_FORMAT, Ticket, check_finite, load_ticket

log = logging.getLogger(__name__)

_STATE_KEYS = ("state_dict", "model_state_dict", "net", "model")
"""Keys under which checkpoints store the state dict of the model."""

_LEAST_ZEROS = 1e-3
"""Least fraction of zeros at which the zeros count as masks when no format is given."""

_LISTED_LAYERS = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.BatchNorm1d)
"""The layers that have an entry in ticket_robust's list of masks."""


@checks_types
def from_state_dict(
    state_dict: Mapping[str, Any], *, density: GivenDensity = None, format: str | None = None, dense: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Divide a pruned model's state dict, or a checkpoint that contains it, into masks and a dense state dict.

    Args:
        state_dict: tensors by name, or a checkpoint that has them under "state_dict", "model_state_dict", "net" or
            "model", or as its only dict of tensors. The prefixes "module.", "model." and "_orig_mod." are removed if
            all names have them. Values that are not tensors are ignored.
        density, format, dense: as in `load_pruned`.

    Returns:
        The masks of all weights of two or four dimensions, keyed by module name; and the state dict for the dense model
        with `weight * mask`, where pruned entries are 0 even if they were not finite.

    Raises:
        ValueError: if there is no mask, a mask has no parameter of its shape, or it has values other than 0 and 1; or
            if a weight that is kept, or a bias, is not finite.

    Examples:
        >>> import torch
        >>> from sparse_adv import masks
        >>> weight = torch.tensor([[1.0, 0.5], [2.0, 3.0]])
        >>> kept, dense = masks.from_state_dict({"fc.weight_orig": weight, "fc.weight_mask": (weight > 1).float()})
        >>> kept["fc"].tolist(), dense["fc.weight"].tolist()
        ([[False, False], [True, True]], [[0.0, 0.0], [2.0, 3.0]])
    """
    state, _ = _without_prefixes(_find_state(state_dict))
    return _apply_masks(_split(state, format, density, dense)[1])


@checks_types
def load_pruned(
    path: str | os.PathLike[str],
    mask_path: str | os.PathLike[str] | None = None,
    *,
    model: nn.Module | None = None,
    density: GivenDensity = None,
    format: str | None = None,
    dense: bool = False,
) -> Ticket:
    """Read the masks and weights of a pruned model from a file of any supported tool.

    Files may be written by torch.save or safetensors, or be tickets of this library. The formats, recognised by their
    keys (`X` is a module's name):

    - "prune": `X.weight_orig`, `X.weight_mask` (torch.nn.utils.prune, Lightning's ModelPruning).
    - "parametrize": `X.parametrizations.weight.original`, `.0.mask` (torch.nn.utils.parametrize with a buffer `mask`).
    - "masked": `X.weight`, `X.weight_mask` (`MaskedConv2d`, `MaskedLinear`).
    - "turboprune": `X.weight`, `X.mask`.
    - "open_lth": `model.X.weight`, `mask_X___weight`; or dense weights with a file of masks as `mask_path`: OpenLTH's,
      or one with the names `X`, `X.weight`, `X.mask` or `X.weight_mask`.
    - "popup_scores": `X.weight`, `X.popup_scores` (HYDRA; HARP, with `X.k_score`); needs `density`.
    - "mask_list": dense weights with a .npy file as `mask_path`: an object array of the masks of all Conv2d, Linear and
      BatchNorm layers in the order of `model.modules()` (ticket_robust, Li et al. 2020); needs `model`. The masks of
      BatchNorm apply to gamma and beta. That code also changes biases; this is not reproduced.
    - "zeros": none of the above; the zeros in a weight of two or four dimensions are its mask.
    - "ticket": a ticket of this library; its weights are those to start from, without masks applied.

    Args:
        path: the file; the state dict may be inside a checkpoint, as for `from_state_dict`.
        mask_path: the file of the masks, if that is another file.
        model: the dense or sparse model that the weights are for. Prefixes that its own names have are then kept, and
            each mask must match a module and the shape of its weight. Zeros in layers that are neither convolutions nor
            linear, such as embeddings, are then not masks.
        density: for "popup_scores", the fraction of its weights that each layer keeps: one number, or numbers by module
            name. For HARP one number is the global density; each layer's density follows from it and `k_score`.
        format: the format; None to recognise it.
        dense: also accept a file without any mask; the result then has no masks and the format "dense".

    Returns:
        A ticket with the masks, the weights (`weight * mask`), and the provenance "format", "file", "mask_file" and
        "density". The provenance of a ticket file is kept; if the ticket was made from another file, "converted_from"
        names it.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: if a file is damaged or contains other objects than tensors, there are no masks, masks, weights and
            model do not match, or a weight that is kept, or a bias, is not finite.

    Examples:
        >>> import tempfile
        >>> import torch
        >>> from sparse_adv import masks
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"fc.weight": torch.tensor([[1.0, 0.0]]), "fc.bias": torch.zeros(1)}, f"{folder}/model.pt")
        ...     ticket = masks.load_pruned(f"{folder}/model.pt")
        >>> ticket.masks, ticket.provenance["format"]
        ({'fc': tensor([[ True, False]])}, 'zeros')
    """
    path = Path(path)
    if format == "ticket" or (format is None and safetensors_metadata(path).get("format") == TICKET_FORMAT):
        for argument, value in (("mask_path", mask_path), ("density", density)):
            if value is not None:
                raise ValueError(f"{argument} is not for a ticket, which has its own masks: {str(path)!r}")
        ticket = load_ticket(path)
        recorded = ticket.provenance
        origin = {"format": "ticket"} | ({"converted_from": recorded["file"]} if "file" in recorded else {})
        ticket = Ticket(ticket.masks, ticket.state_dict, origin | recorded | {"file": str(path)})
        try:
            check_finite(ticket.masks, ticket.state_dict)
        except ValueError as error:
            raise ValueError(f"{str(path)!r}: {error}") from error
    else:
        ticket = _load(path, None if mask_path is None else Path(mask_path), model, density, format, dense)
    if model is not None:
        _check_model(ticket, model, path)
        ticket = _without_masks_of_others(ticket, model, path)
    return ticket


def _load(
    path: Path, mask_path: Path | None, model: nn.Module | None, density: GivenDensity, format: str | None, dense: bool
) -> Ticket:
    checkpoint = read_tensors(path)
    mask_file = None if mask_path is None else (read_npy_list if is_npy(mask_path) else read_tensors)(mask_path)
    source = {"file": str(path)} | ({} if mask_path is None else {"mask_file": str(mask_path)})
    try:
        state, prefixes = _without_prefixes(_find_state(checkpoint))
        if mask_file is None and _are_masks(state):
            raise ValueError(f"there are masks, but no weights: {COMBINE}")
        if mask_file is None:
            name, split = _split(state, format, density, dense)
        elif isinstance(mask_file, list):
            name, split = "mask_list", DividedState(_require_dense(state), {})
        else:
            name, split = "open_lth", DividedState(_require_dense(state), _masks_in_a_file(mask_file, state))
        if mask_file is not None:
            _check_density(name, density)
        if model is not None:
            split = _restore_prefix(split, prefixes, model)
        if isinstance(mask_file, list):
            split = split._replace(masks=_name_listed_masks(mask_file, model))
        masks, weights = _apply_masks(split)
    except ValueError as error:
        raise ValueError(f"{' with '.join(map(repr, source.values()))}: {error}") from error
    return Ticket(masks, weights, {"format": name, **source, "density": density_of(masks) if masks else None})


def _find_state(checkpoint: object) -> StateDict:
    """Return the tensors of a state dict, which may be nested in a checkpoint."""
    seen: set[int] = set()
    while isinstance(checkpoint, Mapping):
        key = next((key for key in _STATE_KEYS if isinstance(checkpoint.get(key), Mapping)), None)
        key = _only_state(checkpoint) if key is None else key
        if key is None:
            break
        seen.add(id(checkpoint))
        checkpoint = checkpoint[key]
        if id(checkpoint) in seen:
            raise ValueError(f"{key!r} of the checkpoint contains itself")
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"there is no state dict, but a {type(checkpoint).__name__}")
    tensors = {str(key): value.detach() for key, value in checkpoint.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"there is no state dict, only {', '.join(map(str, checkpoint)) or 'an empty one'}")
    for key, value in tensors.items():
        _check_plain(key, value)
    return tensors


def _only_state(checkpoint: Mapping[Any, Any]) -> Any:
    """The key of the only dict of tensors in a checkpoint; None if it holds tensors itself, or no such dict."""
    if any(isinstance(value, Tensor) for value in checkpoint.values()):
        return None
    inner = {key: value.values() for key, value in checkpoint.items() if isinstance(value, Mapping)}
    keys = [key for key, values in inner.items() if any(isinstance(value, Tensor) for value in values)]
    if len(keys) > 1:
        raise ValueError(
            f"there are several state dicts, {', '.join(map(str, keys))}: save the one that is meant alone"
        )
    return keys[0] if keys else None


def _check_plain(key: str, value: Tensor) -> None:
    """Raise ValueError unless the tensor's elements are in memory, one by one, and its name can be written."""
    if any("\ud800" <= character <= "\udfff" for character in key):
        raise ValueError(f"{key!a} is no text")
    kind = "sparse" if value.layout != torch.strided else "quantised" if value.is_quantized else None
    kind = "nested" if value.is_nested else kind
    kind = "on the meta device" if value.is_meta else "complex" if value.is_complex() else kind
    if kind is None:
        try:
            value.new_empty(1) != 0  # noqa: B015
        except RuntimeError:  # numbers smaller than a byte
            kind = f"of dtype {value.dtype}"
    if kind is not None:
        raise ValueError(f"{key!r} is {kind}: only dense tensors of real numbers can be read")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ValueError(f"{key!r} repeats its elements: save a contiguous copy of it")


def _without_prefixes(state: StateDict) -> tuple[StateDict, list[str]]:
    """Remove the prefixes that all names have; return the state dict and the prefixes removed.

    The counter of `AveragedModel`, which stands next to the prefix "module.", is removed too.
    """
    removed: list[str] = []
    of_model = {key: value for key, value in state.items() if key != "n_averaged"}
    if of_model and all(key.startswith("module.") for key in of_model):
        state = of_model
    prefixes = [f"{name}." for name in WRAPPERS]
    while prefix := next((prefix for prefix in prefixes if all(key.startswith(prefix) for key in state)), None):
        removed.append(prefix)
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state, removed


def _restore_prefix(split: DividedState, prefixes: list[str], model: nn.Module) -> DividedState:
    """Put back as many of the removed prefixes as are needed for the most names to be names of the model."""
    modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
    # From no prefix to all of them; among equals, max returns the first, that is the shortest.
    candidates = accumulate(reversed(prefixes), lambda inner, outer: outer + inner, initial="")
    prefix = max(candidates, key=lambda p: sum(module_of(p + name) in modules for name in split.parameters))
    return DividedState(*({prefix + name: value for name, value in part.items()} for part in split))


def _split(
    state: StateDict, format: str | None, density: GivenDensity, dense: bool = False
) -> tuple[str, DividedState]:
    if format is not None and format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    name = format or recognise(state)
    _check_density(name, density)
    split = FORMATS[name].split(state, density)
    if format is None and name == "zeros" and split.masks:
        zeros = sum(int((mask == 0).sum()) for mask in split.masks.values())
        weights = sum(value.numel() for key, value in state.items() if is_maskable_weight(key, value))
        if zeros < _LEAST_ZEROS * weights and not dense:
            raise ValueError(
                f"only {zeros} of {weights} weights are zero, as may happen in a dense model: pass the format "
                "'zeros' to take them for masks"
            )
        split = split if zeros >= _LEAST_ZEROS * weights else DividedState(state, {})
    if not split.masks and dense and format is None:
        return "dense", split
    if not split.masks:
        missing = f"no masks of the format {format!r}" if format else "no masks, and no zeros that could be masks"
        raise ValueError(f"there are {missing} among {len(state)} tensors")
    return name, split


def _check_density(format: str, density: GivenDensity) -> None:
    """Raise ValueError if a density is given for a format that has masks instead of scores."""
    if density is not None and format != "popup_scores":
        raise ValueError(f"density is for the format 'popup_scores', got the format {format!r}")


def _require_dense(state: StateDict) -> StateDict:
    """Return a state dict whose masks are in another file; raise ValueError if it contains masks itself."""
    name = recognise(state)
    if name != "zeros":
        raise ValueError(f"the weights already contain masks in the format {name!r}: do not pass mask_path")
    return state


def _apply_masks(split: DividedState) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the masks by module name, and the masked weights."""
    masks, weights = {}, dict(split.parameters)
    for name, mask in split.masks.items():
        if name not in weights:
            raise ValueError(f"there is a mask for {shortened(name)}, but no tensor of that name")
        if mask.shape != weights[name].shape:
            raise ValueError(
                f"the mask of {name!r} must have shape {tuple(weights[name].shape)}, got {tuple(mask.shape)}"
            )
        invalid = mask[(mask != 0) & (mask != 1)]
        if len(invalid):
            raise ValueError(f"the mask of {name!r} must have no values but 0 and 1, got {float(invalid[0]):g}")
        kept = mask != 0
        weights[name] = torch.where(kept, weights[name], 0)
        if is_maskable_weight(name, kept):
            masks[module_of(name)] = kept
    check_finite({}, weights)  # NaN is not zero, so that it would hide masks that are zeros
    if split.masks and not masks:
        raise ValueError(f"only {', '.join(split.masks)} have masks, but no weight of a convolution or linear layer")
    return masks, weights


def _are_masks(state: StateDict) -> bool:
    """Whether a file holds masks alone: of weights of two or four dimensions, and no value but 0 and 1."""
    return all(value.dim() in (2, 4) and bool(((value == 0) | (value == 1)).all()) for value in state.values())


def _masks_in_a_file(mask_file: object, weights: StateDict) -> StateDict:
    """Return the masks in a file of their own by the names of their parameters, which are among the weights."""
    state, _ = _without_prefixes(_find_state(mask_file))
    return {masked_parameter(key, weights): value for key, value in state.items()}


def _name_listed_masks(masks: list[Tensor], model: nn.Module | None) -> StateDict:
    """Return a list of masks, one for each layer in the order of `model.modules()`, by parameter name."""
    if model is None:
        raise ValueError("the masks have no names, so that the model must be given (convert: --arch)")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, _LISTED_LAYERS)}
    if len(masks) != len(layers):
        raise ValueError(
            f"there are {len(masks)} masks, but the model has {len(layers)} Conv2d, Linear and BatchNorm layers"
        )
    named: StateDict = {}
    for (name, layer), mask in zip(layers.items(), masks, strict=True):
        masked = ("weight",) if isinstance(layer, nn.Conv2d | nn.Linear) else ("weight", "bias")
        named |= {parameter_of(name, parameter): mask for parameter in masked}
    return named


def _without_masks_of_others(ticket: Ticket, model: nn.Module, path: Path) -> Ticket:
    """The ticket without masks of layers that cannot have any, such as embeddings and transposed convolutions."""
    modules, layers = dict(model.named_modules(remove_duplicate=False)), set(maskable(model).values())
    others = [name for name in ticket.masks if modules[name] not in layers]
    if not others:
        return ticket
    log.warning("%s: the zeros in %s stay in the weights: such layers have no masks", path, ", ".join(others))
    kept = {name: mask for name, mask in ticket.masks.items() if name not in others}
    return replace(ticket, masks=kept, provenance=ticket.provenance | {"density": density_of(kept) if kept else None})


def _check_model(ticket: Ticket, model: nn.Module, path: Path) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, mask in ticket.masks.items():
        if name not in modules:
            raise ValueError(f"{str(path)!r} does not fit the model: {unknown_module(name, modules)}")
        weight = getattr(modules[name], "weight", None)
        if not isinstance(weight, Tensor) or weight.shape != mask.shape:
            actual = f"a weight of shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else "no weight"
            raise ValueError(
                f"{str(path)!r} does not fit the model: {name!r} has {actual}, its mask has {tuple(mask.shape)}"
            )
    # A sparse model has its masks in its state dict, and the file's state dict may have them too.
    wanted = {key: value for key, value in model.state_dict().items() if not key.endswith("weight_mask")}
    given = {key: value for key, value in ticket.state_dict.items() if not key.endswith("weight_mask")}
    for key in sorted(wanted.keys() ^ given.keys()):
        differs = "lacks" if key in wanted else "has"
        raise ValueError(f"{str(path)!r} does not fit the model: unlike the model it {differs} {key!r}")
    for key, value in wanted.items():
        if given[key].shape != value.shape:
            shapes = f"shape {tuple(given[key].shape)}, in the model it has {tuple(value.shape)}"
            raise ValueError(f"{str(path)!r} does not fit the model: {key!r} has {shapes}")
