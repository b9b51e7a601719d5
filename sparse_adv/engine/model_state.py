"""The state of a model that its steps depend on, and copies of the model to compare the steps with."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Hashable
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.overrides import TorchFunctionMode

from sparse_adv.engine.content import is_of_library

HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
)
"""The tables of a module in which PyTorch keeps the hooks of its forward and backward pass."""


class _SharedTensors(TorchFunctionMode):
    """A context in which a deep copy shares its tensors with the original."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func is Tensor.__deepcopy__ else func(*args, **(kwargs or {}))


def copy_of_code(model: nn.Module) -> nn.Module:
    """A deep copy that shares all tensors. Attributes that its Python code assigns do not reach the model."""
    tensors = (*model.parameters(), *model.buffers())
    with _SharedTensors():
        return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def detached_copy(model: nn.Module) -> nn.Module:
    """A deep copy. Results of autograd, which modules under `torch.nn.utils.prune` hold, are copied without history."""
    tensors = (item for module in model.modules() for item in vars(module).values() if isinstance(item, Tensor))
    return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in tensors})


def has_hooks(module: nn.Module) -> bool:
    """Whether anything is registered to run in the module's forward or backward pass."""
    return any(getattr(module, table) for table in HOOKS)


def runs_own_code(module: nn.Module) -> bool:
    """Whether a module may compute something else than its class does: it has hooks or its own forward."""
    return has_hooks(module) or "forward" in vars(module)


def runs_code_of_user(module: nn.Module) -> bool:
    """Whether a module or a part of it has hooks, or a class that no library defines."""
    return any(has_hooks(part) or not is_of_library(type(part).__module__) for part in module.modules())


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside wrappers that only call it. They take any arguments, but torch.fx needs arguments with names.

    The forward of DistributedDataParallel would also prepare an all-reduce that is never run.
    """
    while isinstance(model, DistributedDataParallel) or (
        isinstance(model, AveragedModel | nn.DataParallel)
        and type(model).forward in (AveragedModel.forward, nn.DataParallel.forward)
        and len(getattr(model, "device_ids", ())) <= 1
        and not has_hooks(model)
    ):
        model = cast(nn.Module, model.module)
    return model


def has_global_hooks() -> bool:
    """Whether anything is registered to run in the passes of all modules."""
    return any(getattr(torch_module, f"_global{table}") for table in HOOKS)


def structure_of(model: nn.Module) -> Hashable:
    """A model's modules, their classes, hooks and modes, and their tensors."""
    return tuple(map(_structure_of_one, model.modules())), has_global_hooks()


def _structure_of_one(module: nn.Module) -> Hashable:
    children = tuple([(name, id(child)) for name, child in module._modules.items()])
    tensors = [*module._parameters.items(), *module._buffers.items()]
    return (
        weakref.ref(module),  # an address may belong to another module later
        type(module),
        has_hooks(module),
        module.training,
        children,
        tuple([(name, id(t), *((t.shape, t.dtype, t.device) if t is not None else ())) for name, t in tensors]),
    )
