"""What a value holds, in a form that compares equal as long as no part of it changes."""

from __future__ import annotations

import enum
import functools
import logging
import sys
import types
import weakref
from abc import ABCMeta
from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_CONSTANTS = (
    *(bool, int, str, bytes, type(None), type(...), range),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
    *(types.MethodDescriptorType, types.WrapperDescriptorType),
)
_NUMBERS = (float, complex)
"""Numbers for which `==` is not enough: 0.0 equals -0.0, and NaN does not equal itself."""
_CONTAINERS = (tuple, list, set, frozenset, deque, torch.Size)
_MAPPINGS = (dict, types.MappingProxyType)
_OPAQUE = (types.ModuleType, logging.Logger)
"""Objects that are compared by identity."""
_WRAPPERS = (staticmethod, classmethod)
_FUNCTIONS = (types.FunctionType, property, *_WRAPPERS)
"""What the table of a class holds for a method."""
_LIBRARIES = {*sys.stdlib_module_names, "numpy", "torch", "sparse_adv"}
"""Packages whose classes and functions are assumed never to change."""

_MOST_VALUES = 4096
_MOST_BYTES = 1 << 20
"""Of an array. Comparing that many values or bytes takes about 0.5 ms."""


class _Same:
    """A weak reference that equals only those to the same object; `weakref.ref` would compare a tensor's elements."""

    __slots__ = ("_address", "_object")

    def __init__(self, value: Any) -> None:
        self._object, self._address = weakref.ref(value), id(value)

    def __eq__(self, other: object) -> bool:
        mine = self._object()
        return mine is not None and isinstance(other, _Same) and mine is other._object()

    def __hash__(self) -> int:
        return self._address


@dataclass(frozen=True)
class Unseen:
    """Stands for the content of a value whose changes cannot be seen."""

    what: str
    """What it holds."""


class _Plain:
    """A class whose objects hold nothing but their `__dict__`."""


def content(value: object) -> Hashable:
    """What a value holds, including its containers, the attributes of its objects and what its functions refer to.

    Modules, tensors and functions are compared by identity, and tensors by shape, dtype and device too. The globals of
    functions are ignored.

    Args:
        value: any object.

    Returns:
        A value that compares equal while nothing of this changes; `Unseen` if changes of a part cannot be seen, as for
        an object with state outside of its `__dict__`.

    Examples:
        >>> options = {"scale": [1.0, 2.0]}
        >>> before = content(options)
        >>> before == content(options)
        True
        >>> options["scale"][1] = 3.0
        >>> before == content(options)
        False
        >>> content(iter(options))
        Unseen(what='a value of type dict_keyiterator')
    """
    found: list[Hashable] = []
    waiting = [value]
    seen: dict[int, tuple[int, object]] = {}  # keeps the objects, so that no other object gets the same id
    while waiting:
        value = waiting.pop()
        kind = type(value)
        if kind in _CONSTANTS:
            found.append((kind, value))
        elif kind in _NUMBERS:
            found.append((kind, repr(value)))
        elif id(value) in seen:
            found.append(seen[id(value)][0])
        else:
            taken = _taken_apart(value, kind)
            if taken is None:
                return Unseen(f"a value of type {kind.__qualname__}")
            itself, parts = taken
            if len(found) + len(waiting) + len(parts) > _MOST_VALUES:
                return Unseen(f"more than {_MOST_VALUES} values")
            seen[id(value)] = len(found), value
            found.append((itself, len(parts)))
            waiting += parts
    return tuple(found)


def _taken_apart(value: Any, kind: type) -> tuple[Hashable, list[Any]] | None:
    """What is compared of a value itself, and the parts whose content is compared; None if there is more to it."""
    if kind in _CONTAINERS:
        return (kind, value.maxlen if kind is deque else None), list(value)
    if kind in _MAPPINGS:
        return kind, [*value.values(), *value.keys()]
    if kind is types.FunctionType:
        parts = [*_cells(value), *vars(value).values(), *vars(value)]
        return identity(value), [value.__defaults__, value.__kwdefaults__, *parts]
    if kind is types.MethodType:
        return kind, [value.__func__, value.__self__]
    if kind is types.BuiltinFunctionType:
        is_method = not isinstance(value.__self__, (type(None), type, types.ModuleType))
        return (value.__name__, [value.__self__]) if is_method else (weakref.ref(value), [])
    if kind is functools.partial:
        return kind, [value.func, value.args, value.keywords, vars(value)]
    if kind in _WRAPPERS:
        return kind, [value.__func__]
    if kind is property:
        return kind, [value.fget]
    if kind is weakref.ref:
        return kind, [value()]
    if isinstance(value, (nn.Module, *_OPAQUE)):
        return weakref.ref(value), []
    if isinstance(value, Tensor):
        # torch.utils.swap_tensors refuses a parameter that has a weak reference.
        which = id(value) if isinstance(value, nn.Parameter) else _Same(value)
        return (which, value.shape, value.dtype, value.device), []
    if isinstance(value, enum.Enum):
        return (weakref.ref(kind), value.name), [value.value]
    if isinstance(value, type):
        return weakref.ref(value), _parts_of_class(value)
    if isinstance(value, np.dtype):
        return value, []
    if kind is np.ndarray or isinstance(value, np.generic):
        fits = not value.dtype.hasobject and value.nbytes <= _MOST_BYTES
        return ((kind, value.dtype, value.shape, value.tobytes()), []) if fits else None
    if kind is types.SimpleNamespace or (_layout(kind) == _layout(_Plain) and type(kind) in (type, ABCMeta)):
        return weakref.ref(kind), [*_parts_of_class(kind), vars(value)]
    return None


def identity(function: types.FunctionType) -> Hashable:
    """The function's identity and its code: autoreload replaces the code in place."""
    return weakref.ref(function), weakref.ref(function.__code__)


def is_of_library(module: str) -> bool:
    """Whether the classes and functions of the Python module of this name are assumed never to change."""
    return module.partition(".")[0] in _LIBRARIES


def _cells(function: types.FunctionType) -> Iterator[Any]:
    """The values of the variables that a function reads from outer functions."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not assigned yet
            yield types.CellType


def _layout(kind: type) -> tuple[int, int, int, int]:
    """Where the objects of a class keep their attributes; differs if they hold anything besides attributes."""
    return kind.__basicsize__, kind.__itemsize__, kind.__dictoffset__, kind.__weakrefoffset__


def _parts_of_class(kind: type) -> list[Any]:
    return [part for _, name, value in attributes_of_class(kind) for part in (name, value)]


def attributes_of_class(kind: type) -> Iterator[tuple[type, str, Any]]:
    """The attributes of a class and its bases, each with the class that has it; without those of Python and PyTorch."""
    for base in kind.__mro__:
        if not is_of_library(base.__module__):
            for name, value in vars(base).items():
                if isinstance(value, _FUNCTIONS) or not (name.startswith("__") or name == "_abc_impl"):
                    yield base, name, value
