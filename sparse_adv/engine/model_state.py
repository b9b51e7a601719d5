"""The state of a model on which its steps depend, and copies of it to compare them with."""

from __future__ import annotations

import copy
from collections.abc import Hashable

import torch
from torch import Tensor, nn

HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
)
"""The tables of a module in which PyTorch keeps the hooks of its forward and backward pass."""

_PLAIN = (bool, int, float, str, type(None))


def detached_copy(model: nn.Module) -> nn.Module:
    """A deep copy; results of autograd, which modules under `torch.nn.utils.prune` hold, are copied without history."""
    tensors = (item for module in model.modules() for item in vars(module).values() if isinstance(item, Tensor))
    return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in tensors})


def has_hooks(module: nn.Module) -> bool:
    """Whether anything is registered to run in the module's forward or backward pass."""
    return any(getattr(module, table) for table in HOOKS)


def state_of(model: nn.Module, x: Tensor) -> Hashable:
    """All that decides what a model becomes, but the shape of x."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return x.dtype, x.device, structure_of(model), autocast


def structure_of(model: nn.Module) -> Hashable:
    """A model's modules, their modes and attributes, and their tensors."""
    modules = tuple(
        (
            id(module),
            id(vars(module).get("forward", type(module))),
            has_hooks(module),
            tuple(item for item in vars(module).items() if isinstance(item[1], _PLAIN)),
        )
        for module in model.modules()
    )
    return modules, tuple((id(t), t.dtype, t.device) for t in (*model.parameters(), *model.buffers()))
