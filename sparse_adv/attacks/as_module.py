"""Models as attacks take them: modules and plain functions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType

from torch import Tensor, nn

from sparse_adv.engine.model_state import has_global_hooks, has_hooks, unwrapped

Model = nn.Module | Callable[[Tensor], Tensor]
"""The model of an attack: a module, or a plain function that maps images to logits."""


class PlainFunction(nn.Module):
    """A plain function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = (function,)  # in a tuple, so that it is not a submodule whose modes would be set

    def forward(self, x: Tensor) -> Tensor:
        return self.function[0](x)


def as_module(model: object) -> tuple[nn.Module, bool]:
    """Return the model as a module, and whether the engine may trace it: it leaves plain functions to autograd.

    A function that only calls a module counts as that module.

    Raises:
        TypeError: if the model cannot be called.
    """
    model = _called(model)
    if isinstance(model, nn.Module):
        return unwrapped(model), True
    if not callable(model):
        raise TypeError(f"model must be an nn.Module or a function of the images, got {type(model).__name__}")
    return PlainFunction(model), False


def _called(model: object) -> object:
    """The module that a partial or a bound method only calls; any other model unchanged."""
    if type(model) is partial and not (model.args or model.keywords):
        return _called(model.func)
    if isinstance(model, MethodType) and isinstance(model.__self__, nn.Module):
        module = model.__self__
        skips_hooks = has_hooks(module) or has_global_hooks()  # unlike a call of the module, `forward` skips hooks
        if model.__func__ is type(module).__call__ or (model == module.forward and not skips_hooks):
            return module
    return model
