"""The state of a model on which its steps depend, and copies of it to compare them with."""

from __future__ import annotations

import copy
import types
from collections.abc import Hashable, Iterator
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from sparse_adv.nn.masked_layer import MaskedLayer

HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
)
"""The tables of a module in which PyTorch keeps the hooks of its forward and backward pass."""

_PLAIN = (bool, int, float, str, type(None), type, types.FunctionType, types.BuiltinFunctionType)
_CONTAINERS = (tuple, list, dict)
_NOT_WATCHED = frozenset([*vars(nn.Module()), *MaskedLayer.DERIVED])
"""Attributes that PyTorch gives to every module, and those that masked layers derive from their tensors."""
_LONGEST, _DEEPEST = 1024, 8
"""Elements and levels of a container that are compared. A call takes 0.5 ms for a ResNet-18, with or without them."""


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
    modules = tuple(
        (
            id(module),
            id(vars(module).get("forward", type(module))),
            has_hooks(module),
            module.training,
            tuple(_watched(module)),
        )
        for module in model.modules()
    )
    tensors = tuple((id(t), t.dtype, t.device) for t in (*model.parameters(), *model.buffers()))
    return modules, has_global_hooks(), tensors


def _watched(module: nn.Module) -> Iterator[tuple[str, Hashable]]:
    for name, value in vars(module).items():
        if name in _NOT_WATCHED:
            continue
        if isinstance(value, _PLAIN):
            yield name, value
        elif isinstance(value, _CONTAINERS) and (content := _content(value)) is not None:
            yield name, content


def _content(container: tuple | list | dict, level: int = 1) -> Hashable:
    """A copy of the first elements, and the number of all; None if there is any other object among them."""
    content: list[Hashable] = [len(container)]
    for part in islice(container.items() if isinstance(container, dict) else container, _LONGEST):
        if isinstance(part, _CONTAINERS):
            part = None if level == _DEEPEST else _content(part, level + 1)
            if part is None:
                return None
        elif not isinstance(part, _PLAIN):
            return None
        content.append(part)
    return tuple(content)
