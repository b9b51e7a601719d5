"""Frozen modules: the modules of a model that stay in eval mode while it is trained."""

from __future__ import annotations

from collections.abc import Collection
from weakref import WeakKeyDictionary

from torch import nn

_known: WeakKeyDictionary[nn.Module, list[str]] = WeakKeyDictionary()
"""The last result of `frozen_modules` for a model in training mode, because training ends with all of it in eval
mode."""


def frozen_modules(model: nn.Module) -> list[str]:
    """Return the names of modules in eval mode inside a model in training mode.

    For a model in eval mode they are the modules frozen when it was last trained; none if it never was.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2).eval())
        >>> frozen_modules(model), frozen_modules(model.eval()), frozen_modules(nn.Linear(2, 2).eval())
        (['1'], ['1'], [])
    """
    if model.training:
        _known[model] = names_in_eval_mode(model)
    return _known.get(model, [])


def names_in_eval_mode(model: nn.Module) -> list[str]:
    """Return the names of the modules in eval mode.

    Examples:
        >>> names_in_eval_mode(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2).eval()))
        ['1']
    """
    return [name for name, module in model.named_modules() if not module.training]


def set_training_mode(model: nn.Module, frozen: Collection[str]) -> None:
    """Set the model to training mode, except the modules of these names.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        >>> set_training_mode(model, ["1"])
        >>> model[0].training, model[1].training
        (True, False)
    """
    model.train()
    for name, module in model.named_modules():
        if name in frozen:
            module.training = False
