"""Calls of every attack, as a function and as an object, with one argument replaced by a wrong value."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fuzz.case import Wrong, check_refusal
from fuzz.op_calls import shown_value
from fuzz.wrong_values import spoil
from sparse_adv import attacks
from sparse_adv.attacks.options import BasicOptions, CommonOptions, LossOptions

_SMALL = {
    **{"steps": 2, "queries": 3, "n_queries": 3, "restarts": 1, "n_restarts": 1, "binary_search_steps": 1},
    **{"eot_iter": 1, "n_target_classes": 2, "n_classes": 5},
}
_OTHERS = {"losses", "run_attack", "distances", "signs_of_masking"}
FUNCTIONS = sorted(name for name in attacks.__all__ if name[0].islower() and name not in _OTHERS)
CLASSES = sorted(
    name
    for name in attacks.__all__
    if inspect.isclass(getattr(attacks, name)) and issubclass(getattr(attacks, name), attacks.Attack)
    if name not in ("Attack", "AutoAttack", "MultiAttack")
)
_WORDS = ("images", "labels", "eps", "alpha", "queries", "restarts", "targets", "n_target_classes")
"""By which attacks call arguments that others are passed on as, or are compared with."""


def case(rng: random.Random, folder: Path) -> str:
    """Call one attack with one argument replaced."""
    name = rng.choice(FUNCTIONS + CLASSES)
    made = getattr(attacks, name)
    model, images = _network(), torch.rand(4, 3, 6, 6)
    arguments = _arguments(made, images, model(images).argmax(1))
    wrong = rng.choice(sorted(arguments))
    given = spoil(rng, arguments[wrong])
    if wrong in _SMALL and isinstance(given, int) and given > 3:
        given = -given  # instead of a budget that takes years
    arguments[wrong] = given
    batch = [arguments.pop(each) for each in ("images", "labels") if each in arguments]
    try:
        found = made(model, *batch, **arguments) if name in FUNCTIONS else made(model, **arguments)(*batch)
    except Exception as error:
        try:
            _check_refusal(error, wrong)
        except Wrong as refusal:
            raise Wrong(f"{name}({wrong}={shown_value(given)}): {refusal}") from error
        return f"{name}: refused"
    if not isinstance(found, Tensor) or found.shape != batch[0].shape:
        raise Wrong(f"{name}({wrong}={shown_value(given)}) returned {shown_value(found)}")
    return f"{name}: images"


def _network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).eval()


def _arguments(made: Callable[..., Any], images: Tensor, labels: Tensor) -> dict[str, Any]:
    """The arguments of a legal call, without the model; None for options that are left out."""
    parameters = inspect.signature(made).parameters.values()
    given = {each.name: each.default for each in parameters if each.default is not each.empty}
    given |= {name: value for name, value in _SMALL.items() if name in given}
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        options = LossOptions if "LossOptions" in str(inspect.signature(made)) else CommonOptions
        if "BasicOptions" in str(inspect.signature(made)):
            options = BasicOptions
        defaults = attacks.AttackOptions()
        if made is not attacks.FABT:
            given |= {name: getattr(defaults, name) for name in options.__annotations__}
    return given | {"images": images} | ({} if made is attacks.tpgd else {"labels": labels})


def _check_refusal(error: Exception, wrong: str) -> None:
    """What a model says of images of another dtype or shape is its own."""
    if wrong != "images" or not isinstance(error, RuntimeError):
        check_refusal(error, (TypeError, ValueError), [wrong, *_WORDS])
