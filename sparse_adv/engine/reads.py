"""What the Python code of a model reads while it is traced: a trace is right as long as none of this changes."""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import nn

from sparse_adv.engine.content import Unseen, attributes_of_class, content, identity, is_of_library
from sparse_adv.engine.state_cache import ATTRIBUTE
from sparse_adv.engine.traced_code import NotTraceable
from sparse_adv.nn.masked_layer import MaskedLayer

Contents = tuple[tuple[tuple[str, Hashable], ...], ...]
"""Names and contents of the attributes of each module, and at the end of the modules' classes."""

_OF_EVERY_MODULE = frozenset([*vars(nn.Module()), *MaskedLayer.DERIVED, ATTRIBUTE])
"""Attributes that PyTorch or the engine gives to modules, and those that masked layers derive from their tensors."""
_COMPARED = _OF_EVERY_MODULE.union(vars(nn.Module)) - {"forward", "__dict__"}
"""Attributes that are compared in any case, and PyTorch's methods."""
_ALL = "__dict__"
"""The attribute that holds all others."""
_LAYER = "its sizes and options"
"""Stands for the attributes that PyTorch's own layers read: tracing does not look inside these layers."""
_IN_WORDS = {_ALL: "an attribute", _LAYER: "an option"}
"""How a message names what stands for several attributes."""

_CHANGES = "its Python code changes attributes of modules"

_read: WeakKeyDictionary[nn.Module, dict[str, None]] = WeakKeyDictionary()
"""For each module the names of the attributes that traced code has read."""


def contents_of(model: nn.Module) -> Contents:
    """The contents of the attributes that traces of a model have read; others cannot make a trace wrong.

    Methods and plain values of the modules' classes always count, because `super()` and `type(self)` read them unseen.
    """
    modules = list(model.modules())
    found: dict[tuple[type, str], tuple[bool, Hashable]] = {}
    read = [tuple([(name, _held(m, name, found)) for name in tuple(_read.get(m, ()))]) for m in modules]
    return *read, tuple(_contents_of_classes(dict.fromkeys(map(type, modules))))


def all_contents_of(model: nn.Module) -> Contents:
    """The contents of all attributes whose changes can be seen, for code that is repeated without a trace."""
    modules = list(model.modules())
    own = [[item for item in vars(m).items() if item[0] not in _OF_EVERY_MODULE] for m in modules]
    held = [tuple([(name, content(value)) for name, value in attributes]) for attributes in own]
    return *held, tuple(_contents_of_classes(dict.fromkeys(map(type, modules))))


def changed_attribute(model: nn.Module, before: Contents, now: Contents) -> str | None:
    """The first attribute whose content differs, in words for a message; None if all are equal."""
    places = [place for place, _ in model.named_modules()]
    for place, old, new in zip([*places, ""], before, now, strict=False):
        held = dict(old)
        for name, value in new:
            if held.get(name, value) != value:
                if name in _IN_WORDS:
                    return f"{_IN_WORDS[name]} of {_in_words(place)}"
                return f"{place}.{name}" if place else name
    return None


def _in_words(place: str) -> str:
    return f"module {place!r}" if place else "the model"


class Reads:
    """What code reads from modules while this thread traces a copy of a model, and what else the trace would not show.

    From then on, the names of attributes read by the code count for the model, even if it cannot be traced.

    Args:
        model: the model itself.
        copied: a copy of it, which is traced.
    """

    def __init__(self, model: nn.Module, copied: nn.Module) -> None:
        self.refusal = ""
        """Why the model cannot be traced. The code may have caught the error that said so."""
        self._copied, self._originals = copied, dict(zip(copied.modules(), model.modules(), strict=True))
        self._found: dict[tuple[nn.Module, str], Hashable] = {}
        """For each module of the copy and each name, the content at the first read."""
        self._before = _tables(copied)
        self._thread = threading.get_ident()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """A context in which what this thread's code reads is recorded; the thread holds `tracer.lock`.

        Raises:
            NotTraceable: inside the code, if it calls an autograd function of its own.
        """
        kind_of_functions = type(torch.autograd.Function)

        def read(module: nn.Module, name: str) -> Any:
            if threading.get_ident() == self._thread and name not in _COMPARED:
                self._find(module, name, sys._getframe(1).f_globals.get("__name__", ""))
            return object.__getattribute__(module, name)

        def look_up(function: type, name: str) -> Any:
            # PyTorch's `apply` reads this first, even if the code holds `apply` as a bound method.
            if name == "_backward_cls" and threading.get_ident() == self._thread:
                self.refuse(f"{function.__qualname__}, an autograd function of its own, computes a gradient")
            return type.__getattribute__(function, name)

        replaced = _replaced(kind_of_functions, "__getattribute__", look_up)
        with _replaced(nn.Module, "__getattribute__", read), replaced:
            yield

    def add(self, module: nn.Module, name: str) -> None:
        """Note that an attribute of a module is read."""
        if (module, name) not in self._found:
            _read.setdefault(self._originals[module], {})[name] = None
            with torch._C.DisableTorchFunction():  # else this would count as code of the model that reads tensors
                self._found[module, name] = _held(module, name, {})

    def add_layer(self, module: nn.Module) -> None:
        """Note that a module is called that tracing does not look inside."""
        self.add(module, _LAYER)

    def forget(self, kind: type[nn.Module]) -> None:
        """Forget what was noted of modules of a class and of their parts.

        This may also forget what earlier traces read of them, which then costs another trace.
        """
        parts = {part for module in self._copied.modules() if type(module) is kind for part in module.modules()}
        for module, name in self._found:
            if module in parts:
                _read[self._originals[module]].pop(name, None)

    def refuse(self, reason: str) -> NoReturn:
        """Raise NotTraceable."""
        self.refusal = reason
        raise NotTraceable(reason)

    def check(self) -> None:
        """Check the model after the trace.

        Raises:
            NotTraceable: if the code has changed attributes of modules, or has read any that may change unseen.
        """
        if self.refusal:
            raise NotTraceable(self.refusal)
        now = {read: _held(*read, {}) for read in self._found}
        if now != self._found or not _are_same(self._before, _tables(self._copied)):
            raise NotTraceable(_CHANGES)
        places = {module: place for place, module in self._copied.named_modules()}
        for (module, name), held in self._found.items():
            if isinstance(held, Unseen):
                raise NotTraceable(
                    f"its Python code reads {name!r} of {_in_words(places[module])}: {held.what}, "
                    "of which changes would not be seen"
                )

    def _find(self, module: nn.Module, name: str, reader: str) -> None:
        """Note that code of a Python module reads an attribute, unless that is compared in any case."""
        if name.startswith("__") and (name != _ALL or is_of_library(reader)):
            return
        if module in self._originals:
            own, before = object.__getattribute__(module, _ALL), self._before[module][0]
            in_table = any(name in own.get(table, ()) for table in ("_parameters", "_buffers", "_modules"))
            is_assigned = own.get(name) is not before.get(name)  # by this code, so it is a result
            if not in_table and not is_assigned:
                self.add(module, name)
        elif not is_of_library(reader):
            self.refuse(f"its Python code reads {name!r} of a {type(module).__name__} that is no part of it")


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """A context in which a model runs.

    Raises:
        NotTraceable: if its code has changed attributes of modules.
    """
    before = _tables(model)
    yield
    if not _are_same(before, _tables(model)):
        raise NotTraceable(_CHANGES)


@contextmanager
def _replaced(kind: Any, name: str, value: object) -> Iterator[None]:
    """A context in which a class has its own attribute in place of an inherited one."""
    setattr(kind, name, value)
    try:
        yield
    finally:
        delattr(kind, name)


_Tables = dict[nn.Module, list[dict[str, Any]]]


def _tables(model: nn.Module) -> _Tables:
    """For each module, copies of its attributes and of those attributes that are dicts, such as the tables of hooks."""
    return {
        module: [dict(table) for table in (vars(module), *vars(module).values()) if isinstance(table, dict)]
        for module in model.modules()
    }


def _are_same(first: _Tables, second: _Tables) -> bool:
    return list(first) == list(second) and all(
        list(one) == list(other) and all(value is other[name] for name, value in one.items())
        for module in first
        for one, other in zip(first[module], second[module], strict=True)
    )


def _held(module: nn.Module, name: str, of_classes: dict[tuple[type, str], tuple[bool, Hashable]]) -> Hashable:
    """What an attribute of a module holds. Runs no code of the module's class, such as a property.

    Args:
        of_classes: what earlier calls found in the classes of modules; new findings are added.
    """
    kind, own = type(module), object.__getattribute__(module, _ALL)
    if name == _LAYER:
        constants = tuple(own.get(constant) for constant in getattr(kind, "__constants__", ()))
        return content(own["forward"]) if "forward" in own else _as_key(constants)
    if name == _ALL:
        return content([part for item in own.items() if item[0] not in _OF_EVERY_MODULE for part in item])
    if (kind, name) not in of_classes:
        of_classes[kind, name] = _held_by_class(kind, name)
    has_precedence, held = of_classes[kind, name]
    return held if has_precedence or name not in own else content(own[name])


def _as_key(constants: tuple[object, ...]) -> Hashable:
    """The tuple itself if it can be hashed, which is fastest, else its content."""
    try:
        hash(constants)
    except TypeError:
        return content(constants)
    return constants


def _held_by_class(kind: type, name: str) -> tuple[bool, Hashable]:
    """Whether a class's attribute takes precedence over the object's, as a property does, and its content."""
    for base in kind.__mro__:
        if name in vars(base):
            value = vars(base)[name]
            return hasattr(type(value), "__set__"), None if is_of_library(base.__module__) else content(value)
    return False, None


def _contents_of_classes(kinds: Iterable[type]) -> Iterator[tuple[str, Hashable]]:
    attributes = {(base, name): value for kind in kinds for base, name, value in attributes_of_class(kind)}
    for (base, name), value in attributes.items():
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        held = identity(function) if isinstance(function, types.FunctionType) else content(value)
        if not isinstance(held, Unseen):
            yield f"{base.__qualname__}.{name}", held
