"""A model in the modes of an attack: eval mode, except for a requested mode of BatchNorm.

Training flags belong to the modules, and other threads use these too. So a model in other modes is not changed if that
can be avoided: a twin runs in its place. The twin's modules have the same classes as the model's and share all their
attributes, except the flags, the table of submodules and what the engine has made of the model.
"""

from __future__ import annotations

import enum
import threading
import types
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from sparse_adv.engine.model_state import has_global_hooks, has_hooks
from sparse_adv.engine.state_cache import ATTRIBUTE
from sparse_adv.nn.masked_layer import MaskedLayer

Flags = dict[str, bool]
"""Values of flags of a module."""


@dataclass(frozen=True)
class TrainingMode:
    """All modules in training mode, but BatchNorm and dropout only on request; running statistics do not change."""

    batch_norm: bool
    dropout: bool


Mode = str | TrainingMode
"""A mode of `bn_mode`, or of training."""

_FLAGS = frozenset(["training", "track_running_stats"])

_twins: weakref.WeakKeyDictionary[nn.Module, dict[Mode, nn.Module]] = weakref.WeakKeyDictionary()
"""The twin for each model and mode: always the same object, because the engine keeps programs by model."""
_lock = threading.Lock()

_OF_EVERY_MODULE = frozenset([*vars(nn.Module()), ATTRIBUTE])
_PLAIN = (
    *(bool, int, float, complex, str, bytes, type(None), type(...), type, enum.Enum, Tensor, types.BuiltinFunctionType),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Generator, torch.Size),
)
_DEEPEST = 4
"""Number of nested levels in which a container is searched for modules."""


@contextmanager
def bn_mode(model: nn.Module, mode: Mode) -> Iterator[None]:
    """Put a model in eval mode, except for its BatchNorm layers, and restore all flags at the end.

    Args:
        model: any model.
        mode: mode of BatchNorm layers: "eval" uses the running statistics, "train" the statistics of the batch and
            updates the running ones, "batch" the statistics of the batch without updating the running ones. A layer in
            eval mode inside a model in training mode was frozen on purpose, and uses its running statistics in all of
            these modes. Or a `TrainingMode`.
    """
    # Set flags module by module: model.train() at the end would unfreeze layers frozen in eval mode. Do not write flags
    # that need no change: another thread may change them meanwhile.
    before = [
        (module, name, getattr(module, name))
        for module, flags in _wanted(model, mode)
        for name, value in flags.items()
        if getattr(module, name) != value
    ]
    try:
        for module, name, flag in before:
            setattr(module, name, not flag)
        yield
    finally:
        for module, name, flag in before:
            setattr(module, name, flag)


@contextmanager
def in_mode(model: nn.Module, mode: Mode) -> Iterator[nn.Module]:
    """A context whose value computes what the model does in a mode of `bn_mode`: the model itself, or a twin.

    The model's flags are changed, as by `bn_mode`, only if a twin might compute something else: if modules have hooks,
    their own `forward`, or attributes that may lead to modules. Attributes that a twin's code assigns are assigned to
    the model's modules at the end.
    """
    wanted = _wanted(model, mode)
    fits = all(getattr(module, name) == value for module, flags in wanted for name, value in flags.items())
    if fits and mode not in _twins.get(model, ()):
        yield model
        return
    if not all(_can_have_twin(module) for module, _ in wanted) or has_global_hooks():
        with bn_mode(model, mode):
            yield model
        return
    twin = _twin(model, mode)
    lent = [_Lent(module, copied, flags) for (module, flags), copied in zip(wanted, twin.modules(), strict=True)]
    try:
        yield twin
    finally:
        if any([each.take_back() for each in lent]):
            with _lock:
                _twins.pop(model, None)


def _wanted(model: nn.Module, mode: Mode) -> list[tuple[nn.Module, Flags]]:
    """The flags of each module in a mode."""
    was_training = model.training
    wanted = []
    for module in model.modules():
        is_norm, frozen = isinstance(module, _BatchNorm), was_training and not module.training
        if isinstance(mode, TrainingMode):
            is_dropout = isinstance(module, _DropoutNd)
            flags = {"training": mode.batch_norm if is_norm else mode.dropout if is_dropout else True}
        else:
            flags = {"training": mode != "eval" and is_norm and not frozen}
        keeps_statistics = mode == "batch" or (isinstance(mode, TrainingMode) and mode.batch_norm)
        wanted.append((module, flags | {"track_running_stats": False} if is_norm and keeps_statistics else flags))
    return wanted


def _twin(model: nn.Module, mode: Mode) -> nn.Module:
    """The model's twin for a mode; a new one if modules of the model were replaced."""
    with _lock:
        twins = _twins.setdefault(model, {})
        if mode not in twins or _structure(twins[mode]) != _structure(model):
            twins[mode] = _copied(model, {})
        return twins[mode]


def _structure(model: nn.Module) -> list[tuple[type, list[tuple[str, int | None]]]]:
    """The classes of all modules, and the submodules of each."""
    places: dict[nn.Module | None, int] = {module: i for i, module in enumerate(model.modules())}
    return [
        (type(module), [(name, places.get(child)) for name, child in module._modules.items()])
        for module in model.modules()
    ]


def _copied(module: nn.Module, copies: dict[nn.Module, nn.Module]) -> nn.Module:
    """New modules with the same classes and structure; `_Lent` gives them their attributes."""
    if module not in copies:
        copies[module] = copied = object.__new__(type(module))
        children = {name: None if child is None else _copied(child, copies) for name, child in module._modules.items()}
        object.__setattr__(copied, "__dict__", {"_modules": children})
    return copies[module]


class _Lent:
    """The present attributes of a module, lent to its twin; flags and submodules are the twin's own."""

    def __init__(self, module: nn.Module, twin: nn.Module, flags: Flags) -> None:
        self._module, self._twin = module, twin
        own = {"_modules": twin._modules, ATTRIBUTE: vars(twin).get(ATTRIBUTE)}
        self._given = {**vars(module), **own, **flags}
        self._children = dict(twin._modules)
        object.__setattr__(twin, "__dict__", dict(self._given))

    def take_back(self) -> bool:
        """Give the module the attributes assigned to its twin; return whether submodules are among them."""
        own, missing = vars(self._module), object()
        for name in vars(self._twin).keys() - _FLAGS - {ATTRIBUTE}:
            before, value = self._given.get(name, missing), vars(self._twin)[name]
            if value is not before and own.get(name, missing) is before:  # else another thread has assigned it too
                own[name] = value
        assigned = {
            name: child for name, child in self._twin._modules.items() if self._children.get(name, missing) is not child
        }
        self._module._modules.update(assigned)
        return bool(assigned)


def _can_have_twin(module: nn.Module) -> bool:
    """Whether a module's code finds other modules only in its table of submodules, and nothing is bound to it."""
    kind = type(module)
    if has_hooks(module) or isinstance(module, torch.jit.ScriptModule) or hasattr(kind, "__del__"):
        return False
    if any(base.__dict__.get("__slots__") for base in kind.__mro__):
        return False
    own = _OF_EVERY_MODULE.union(MaskedLayer.DERIVED) if isinstance(module, MaskedLayer) else _OF_EVERY_MODULE
    return all(name in own or _leads_to_no_module(value) for name, value in vars(module).items())


def _leads_to_no_module(value: object, level: int = 0) -> bool:
    """Whether no module can be reached from a value."""
    if isinstance(value, _PLAIN):
        return not isinstance(getattr(value, "__self__", None), nn.Module)
    if level == _DEEPEST:
        return False
    if isinstance(value, (tuple, list, set, frozenset)):
        return all(_leads_to_no_module(part, level + 1) for part in value)
    if isinstance(value, dict):
        return all(_leads_to_no_module(part, level + 1) for pair in value.items() for part in pair)
    if isinstance(value, partial):
        return _leads_to_no_module((value.func, value.args, value.keywords), level)
    if isinstance(value, weakref.ref):
        return _leads_to_no_module(value(), level + 1)
    return isinstance(value, types.FunctionType) and value.__closure__ is None and value.__defaults__ is None
