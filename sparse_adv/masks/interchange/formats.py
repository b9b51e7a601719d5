"""The formats of other tools: how a pruned model's state dict is divided into dense parameters and masks."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_adv.masks.layers import parameter_of

StateDict = dict[str, Tensor]
WRAPPERS = ("module", "_orig_mod", "model")
"""Prefixes that DataParallel, torch.compile and wrapper modules add to all names."""

GivenDensity = float | Mapping[str, float] | None

_HARP_MIN_SHARE = 0.1
"""The lowest density of a layer in HARP, as a fraction of the global density."""


class DividedState(NamedTuple):
    """A state dict divided into parameters and masks."""

    parameters: StateDict
    """Parameters and buffers, with the names of the dense model; pruned weights may have any value."""
    masks: StateDict
    """Masks by the name of their parameter: 0 = pruned, 1 = kept, in any dtype."""


class Format(NamedTuple):
    """A way to store masks in a state dict."""

    recognise: Callable[[StateDict], bool]
    split: Callable[[StateDict, GivenDensity], DividedState]


def recognise(state: StateDict) -> str:
    """Return the name of the first format that recognises the state dict; "zeros" recognises all."""
    return next(name for name, format in FORMATS.items() if format.recognise(state))


def module_of(parameter: str) -> str:
    """Return the module name in a parameter name: "layer1.conv" for "layer1.conv.weight"."""
    return parameter.rpartition(".")[0]


def is_maskable_weight(name: str, value: Tensor) -> bool:
    """Return whether a tensor of this name and shape may be the weight of a convolution or linear layer."""
    return _last_part(name) == "weight" and value.dim() in (2, 4)


def open_lth_parameter(key: str) -> str:
    """Return the name of a parameter from OpenLTH's name of its mask: "conv.weight" for "mask_conv___weight"."""
    return key.removeprefix("mask_").replace("___", ".")


def masked_parameter(key: str, weights: StateDict) -> str:
    """Return the parameter that a mask in a file of its own is for, from the mask's name, in one of several styles."""
    own = open_lth_parameter(key)
    # A module may be called mask_head: the name as it is comes first.
    styles = [(name, name.removesuffix("_mask"), parameter_of(name.removesuffix(".mask"))) for name in (key, own)]
    return next((name for names in styles for name in names if name in weights), own)


def _last_part(key: str) -> str:
    return key.rpartition(".")[2]


def _divide(state: StateDict, masks: Mapping[str, str], renamed: Mapping[str, str] | None = None) -> DividedState:
    """Divide a state dict.

    Args:
        state: the state dict.
        masks: for each key of a mask, the name of its parameter.
        renamed: maps keys that have another name in the dense model to that name.
    """
    new_names = renamed or {}
    parameters = {new_names.get(key, key): value for key, value in state.items() if key not in masks}
    return DividedState(parameters, {parameter: state[key] for key, parameter in masks.items()})


def _split_suffixed(state: StateDict, density: GivenDensity) -> DividedState:
    """`X_mask` with `X_orig` (torch.nn.utils.prune, for any parameter X) or with `X` (this library)."""
    masks = {key: key.removesuffix("_mask") for key in state if key.endswith("_mask")}
    masks = {
        key: name for key, name in masks.items() if f"{name}_orig" in state or _last_part(name) in ("weight", "bias")
    }
    return _divide(state, masks, {f"{name}_orig": name for name in masks.values() if f"{name}_orig" in state})


_PARAMETRIZED = re.compile(r"(?:(?P<module>.*)\.)?parametrizations\.(?P<leaf>[^.]+)\.(?:original|(?P<at>\d+)\.mask)")


def _split_parametrized(state: StateDict, density: GivenDensity) -> DividedState:
    """`X.parametrizations.weight.original` and `.0.mask`, for any parameter; several masks in a chain are combined."""
    parameters: StateDict = {}
    masks: StateDict = {}
    for key, value in state.items():
        if "parametrizations." not in key:
            parameters[key] = value
            continue
        match = _PARAMETRIZED.fullmatch(key)
        if match is None:
            raise ValueError(f"{key!r} belongs to a parametrization that is not a mask: make it permanent first")
        name = parameter_of(match["module"] or "", match["leaf"])
        if match["at"] is None:
            parameters[name] = value
        else:
            masks[name] = torch.where(masks[name] != 0, value, 0) if name in masks else value
    without_mask = [name for name in parameters if name not in state and name not in masks]
    if without_mask:
        raise ValueError(
            f"the parametrization of {without_mask[0]!r} has no mask: make it permanent first (torch.ao.pruning: "
            "squash_mask)"
        )
    return DividedState(parameters, masks)


def _split_turboprune(state: StateDict, density: GivenDensity) -> DividedState:
    """TurboPrune: `X.mask` with `X.weight`."""
    return _divide(state, {key: parameter_of(module_of(key)) for key in state if _last_part(key) == "mask"})


def _split_open_lth(state: StateDict, density: GivenDensity) -> DividedState:
    """OpenLTH: `mask_X___weight`, next to the model, which is a child named "model"."""
    masks = {key: open_lth_parameter(key) for key in state if key.startswith("mask_")}
    return _divide(state, masks, {key: key.removeprefix("model.") for key in state})


def _split_scores(state: StateDict, density: GivenDensity) -> DividedState:
    """`X.popup_scores` with `X.weight` (HYDRA; HARP, with `X.k_score`): each layer keeps the highest |scores|."""
    parameters = {key: value for key, value in state.items() if _last_part(key) not in ("popup_scores", "k_score")}
    masks = {}
    for key, scores in state.items():
        if _last_part(key) == "popup_scores":
            layer_density = _layer_density(module_of(key), state, density)
            # As in their code: the number of pruned weights is rounded down; for HARP it is computed in k_score's
            # dtype.
            pruned = int((1 - layer_density) * scores.numel())
            order = scores.detach().abs().flatten().argsort(stable=True)
            mask = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
            mask[order[:pruned]] = False
            masks[parameter_of(module_of(key))] = mask.reshape(scores.shape)
    return DividedState(parameters, masks)


def _layer_density(module: str, state: StateDict, density: GivenDensity) -> float | Tensor:
    """The density of a layer: given, or for HARP lowest + sigmoid(k_score) (1 - lowest), with lowest = 0.1 density."""
    k_score = state.get(parameter_of(module, "k_score"))
    given = density
    if isinstance(density, Mapping):
        k_score, given = None, density.get(module)
    if not isinstance(given, int | float) or not 0 <= given <= 1:
        raise ValueError(f"density must give the fraction of {module!r} to keep, in [0, 1], got {given!r}")
    if k_score is None:
        return given
    lowest = _HARP_MIN_SHARE * given
    return k_score.detach().sigmoid() * (1 - lowest) + lowest


def _split_zeros(state: StateDict, density: GivenDensity) -> DividedState:
    """A dense state dict: the zeros in a weight of two or four dimensions are its mask; without zeros it has none."""
    weights = {key: value for key, value in state.items() if is_maskable_weight(key, value) and not value.all()}
    return DividedState(state, {key: value != 0 for key, value in weights.items()})


def _has_key(test: Callable[[str, StateDict], bool]) -> Callable[[StateDict], bool]:
    return lambda state: any(test(key, state) for key in state)


FORMATS: dict[str, Format] = {
    "parametrize": Format(_has_key(lambda key, state: "parametrizations." in key), _split_parametrized),
    "prune": Format(
        _has_key(lambda key, state: key.endswith("_mask") and f"{key.removesuffix('_mask')}_orig" in state),
        _split_suffixed,
    ),
    "masked": Format(_has_key(lambda key, state: _last_part(key) == "weight_mask"), _split_suffixed),
    "popup_scores": Format(_has_key(lambda key, state: _last_part(key) == "popup_scores"), _split_scores),
    "open_lth": Format(_has_key(lambda key, state: key.startswith("mask_") and "___" in key), _split_open_lth),
    "turboprune": Format(
        _has_key(lambda key, state: _last_part(key) == "mask" and parameter_of(module_of(key)) in state),
        _split_turboprune,
    ),
    "zeros": Format(lambda state: True, _split_zeros),
}
"""Formats by name, in the order in which they are tried; `MaskedConv2d` and `MaskedLinear` have "masked"."""
