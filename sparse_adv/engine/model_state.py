"""The state of a model on which its steps depend, and copies of it to compare them with."""

from __future__ import annotations

import copy
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode

from sparse_adv.engine.attributes import content
from sparse_adv.engine.state_cache import ATTRIBUTE
from sparse_adv.nn.masked_layer import MaskedLayer

HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
)
"""The tables of a module in which PyTorch keeps the hooks of its forward and backward pass."""

_NOT_WATCHED = frozenset([*vars(nn.Module()), *MaskedLayer.DERIVED, ATTRIBUTE])
"""Attributes that PyTorch or the engine gives to modules, and those that masked layers derive from their tensors."""


class _SharedTensors(TorchFunctionMode):
    """A context in which deep copies share the tensors of what is copied."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func is Tensor.__deepcopy__ else func(*args, **(kwargs or {}))


def copy_of_code(model: nn.Module) -> nn.Module:
    """A deep copy that shares all tensors: what its Python code assigns, the model does not get."""
    tensors = (*model.parameters(), *model.buffers())
    with _SharedTensors():
        return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def detached_copy(model: nn.Module) -> nn.Module:
    """A deep copy; results of autograd, which modules under `torch.nn.utils.prune` hold, are copied without history."""
    tensors = (item for module in model.modules() for item in vars(module).values() if isinstance(item, Tensor))
    return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in tensors})


def has_hooks(module: nn.Module) -> bool:
    """Whether anything is registered to run in the module's forward or backward pass."""
    return any(getattr(module, table) for table in HOOKS)


def has_global_hooks() -> bool:
    """Whether anything is registered to run in the passes of all modules."""
    return any(getattr(torch_module, f"_global{table}") for table in HOOKS)


def state_of(model: nn.Module, x: Tensor) -> Hashable:
    """All that decides what a model becomes, but the shape of x."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return x.dtype, x.device, structure_of(model), autocast


def structure_of(model: nn.Module) -> Hashable:
    """A model's modules, their hooks, modes and attributes, and their tensors."""
    seen: set[int] = set()
    modules = tuple(
        (
            id(module),
            id(vars(module).get("forward", type(module))),
            has_hooks(module),
            module.training,
            content({name: value for name, value in vars(module).items() if name not in _NOT_WATCHED}, seen),
        )
        for module in model.modules()
    )
    tensors = tuple((id(t), t.dtype, t.device) for t in (*model.parameters(), *model.buffers()))
    return modules, has_global_hooks(), tensors
