"""The formats: how a pruned model's state dict divides into the dense model's parameters and masks for some of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_adv.masks.layers import parameter_of

State = dict[str, Tensor]
Density = float | Mapping[str, float] | None

_HARP_LEAST = 0.1
"""HARP keeps at least this share of the global density in each layer."""


class Split(NamedTuple):
    """A state dict divided."""

    parameters: State
    """Parameters and buffers by the names that the dense model gives them; weights may hold values where pruned."""
    masks: State
    """By the name of the parameter: 0 = pruned, 1 = kept, in any dtype."""


class Format(NamedTuple):
    """A way to write masks into a state dict."""

    recognise: Callable[[State], bool]
    split: Callable[[State, Density], Split]


def recognised(state: State) -> str:
    """The name of the first format that knows the state dict for its own; "zeros", if no other does."""
    return next(name for name, format in FORMATS.items() if format.recognise(state))


def module_of(parameter: str) -> str:
    """The name of the module that a parameter belongs to: "layer1.conv" of "layer1.conv.weight"."""
    return parameter.rpartition(".")[0]


def is_maskable_weight(name: str, value: Tensor) -> bool:
    """Whether it may be the weight of a convolution or linear layer, as far as name and shape tell."""
    return _leaf(name) == "weight" and value.dim() in (2, 4)


def open_lth_parameter(key: str) -> str:
    """OpenLTH's name of a mask, as the name of its parameter: "conv.weight" of "mask_conv___weight"."""
    return key.removeprefix("mask_").replace("___", ".")


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def _split(state: State, masks: Mapping[str, str], renamed: Mapping[str, str] | None = None) -> Split:
    """Divide, given the keys of masks with the parameters they belong to, and keys that dense models call otherwise."""
    new = renamed or {}
    parameters = {new.get(key, key): value for key, value in state.items() if key not in masks}
    return Split(parameters, {parameter: state[key] for key, parameter in masks.items()})


def _suffixed(state: State, density: Density) -> Split:
    """`X.weight_mask` beside `X.weight_orig` (nn.utils.prune, of any parameter) or beside `X.weight` (ours)."""
    masks = {key: key.removesuffix("_mask") for key in state if key.endswith("_mask")}
    masks = {key: name for key, name in masks.items() if f"{name}_orig" in state or _leaf(name) in ("weight", "bias")}
    return _split(state, masks, {f"{name}_orig": name for name in masks.values() if f"{name}_orig" in state})


_PARAMETRIZED = re.compile(r"(?:(?P<module>.*)\.)?parametrizations\.(?P<leaf>[^.]+)\.(?:original|(?P<at>\d+)\.mask)")


def _parametrized(state: State, density: Density) -> Split:
    """`X.parametrizations.weight.original` and `.0.mask`, for any parameter, perhaps several masks in a chain."""
    parameters: State = {}
    masks: State = {}
    for key, value in state.items():
        if "parametrizations." not in key:
            parameters[key] = value
            continue
        match = _PARAMETRIZED.fullmatch(key)
        if match is None:
            raise ValueError(f"{key!r} is part of a parametrization that is no mask: make it permanent first")
        name = parameter_of(match["module"] or "", match["leaf"])
        if match["at"] is None:
            parameters[name] = value
        else:
            masks[name] = torch.where(masks[name] != 0, value, 0) if name in masks else value
    bare = [name for name in parameters if name not in state and name not in masks]
    if bare:
        raise ValueError(
            f"the parametrization of {bare[0]!r} has no mask: make it permanent first (torch.ao.pruning: squash_mask)"
        )
    return Split(parameters, masks)


def _beside(state: State, density: Density) -> Split:
    """TurboPrune's `X.mask` beside `X.weight`."""
    return _split(state, {key: parameter_of(module_of(key)) for key in state if _leaf(key) == "mask"})


def _open_lth(state: State, density: Density) -> Split:
    """OpenLTH's pruned model: `mask_X___weight` beside the model as its child "model"."""
    masks = {key: open_lth_parameter(key) for key in state if key.startswith("mask_")}
    return _split(state, masks, {key: key.removeprefix("model.") for key in state})


def _scored(state: State, density: Density) -> Split:
    """`X.popup_scores` beside `X.weight` (HYDRA; HARP, with `X.k_score`): each layer keeps its highest |scores|."""
    parameters = {key: value for key, value in state.items() if _leaf(key) not in ("popup_scores", "k_score")}
    masks = {}
    for key, scores in state.items():
        if _leaf(key) == "popup_scores":
            share = _share(module_of(key), state, density)
            # The number pruned is rounded down, and in HARP's case computed in the dtype of its rate, as they do it.
            pruned = int((1 - share) * scores.numel())
            order = scores.detach().abs().flatten().argsort(stable=True)
            mask = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
            mask[order[:pruned]] = False
            masks[parameter_of(module_of(key))] = mask.reshape(scores.shape)
    return Split(parameters, masks)


def _share(module: str, state: State, density: Density) -> float | Tensor:
    """The fraction of its weights that this layer keeps: given, or for HARP sigmoid(k_score) (1 - least) + least."""
    rate = state.get(parameter_of(module, "k_score"))
    share = density
    if isinstance(density, Mapping):
        rate, share = None, density.get(module)
    if not isinstance(share, int | float) or not 0 <= share <= 1:
        raise ValueError(f"density must say which fraction of {module!r} is kept, in [0, 1], got {share!r}")
    if rate is None:
        return share
    least = _HARP_LEAST * share
    return rate.detach().sigmoid() * (1 - least) + least


def _zeros(state: State, density: Density) -> Split:
    """A plain dense state dict: a weight of two or four dimensions that has zeros is masked where they are."""
    found = {key: value for key, value in state.items() if is_maskable_weight(key, value) and not value.all()}
    return Split(state, {key: value != 0 for key, value in found.items()})


def _any(test: Callable[[str, State], bool]) -> Callable[[State], bool]:
    return lambda state: any(test(key, state) for key in state)


FORMATS: dict[str, Format] = {
    "parametrize": Format(_any(lambda key, state: "parametrizations." in key), _parametrized),
    "prune": Format(
        _any(lambda key, state: key.endswith("_mask") and f"{key.removesuffix('_mask')}_orig" in state), _suffixed
    ),
    "masked": Format(_any(lambda key, state: _leaf(key) == "weight_mask"), _suffixed),
    "popup_scores": Format(_any(lambda key, state: _leaf(key) == "popup_scores"), _scored),
    "open_lth": Format(_any(lambda key, state: key.startswith("mask_") and "___" in key), _open_lth),
    "turboprune": Format(
        _any(lambda key, state: _leaf(key) == "mask" and parameter_of(module_of(key)) in state), _beside
    ),
    "zeros": Format(lambda state: True, _zeros),
}
"""By name, in the order of recognition. "masked" is what `MaskedConv2d` and `MaskedLinear` write."""
