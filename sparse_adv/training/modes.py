"""Frozen modules: those of a model that stay in eval mode while it is trained."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn


def frozen_modules(model: nn.Module) -> list[str]:
    """Return the names of modules in eval mode inside of a model in training mode; none for a model in eval mode.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2).eval())
        >>> frozen_modules(model), frozen_modules(model.eval())
        (['1'], [])
    """
    return [name for name, module in model.named_modules() if model.training and not module.training]


def set_training_mode(model: nn.Module, frozen: Collection[str]) -> None:
    """Set the model to training mode, but for the modules of these names.

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
