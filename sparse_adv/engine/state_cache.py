"""What the engine has made of models, kept for the states in which each model was used last."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

from torch import nn

T = TypeVar("T")

ATTRIBUTE = "_made_by_engine"
"""The attribute of a model that holds what was made of it."""


class _Made:
    """What caches hold of one model.

    It is an attribute of the model: so both are freed together, although values refer to modules, and the hooks of
    these may refer to the model. Copies and pickles of the model have an empty dictionary in its place.
    """

    __slots__ = ("model", "values")

    def __init__(self, model: nn.Module) -> None:
        self.model = weakref.ref(model)
        self.values: dict[StateCache[Any], dict[Hashable, Any]] = {}

    def __reduce__(self) -> tuple[type[dict[Any, Any]], tuple[()]]:
        return dict, ()


class StateCache(Generic[T]):
    """Values by model and state; what belongs to a model is freed with it.

    Args:
        capacity: values that are kept of each model; beyond it the one that was used least recently is forgotten.

    Examples:
        >>> cache, model = StateCache(capacity=4), nn.ReLU()
        >>> cache.find(model, lambda: "eval", lambda: 1), cache.find(model, lambda: "eval", lambda: 2)
        (1, 1)
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._lock = threading.RLock()  # of one thread's own: a model's code may run another model

    def find(self, model: nn.Module, state: Callable[[], Hashable], make: Callable[[], T]) -> T:
        """Return the value for the present state of the model, made now if there is none; other threads wait for it.

        The state is read again when the value is made: what a value depends on may be known only then.
        """
        with self._lock:
            values = self._values_of(model)
            now = state()
            if now in values:
                value = values.pop(now)
            else:
                value, now = make(), state()
            values[now] = value  # now the last one
            while len(values) > self.capacity:
                del values[next(iter(values))]
        return value

    def get(self, model: nn.Module, state: Hashable) -> T | None:
        """Return the value for a state of the model, or None if there is none."""
        with self._lock:
            values = self._values_of(model)
            value = values.pop(state, None)
            if value is not None:
                values[state] = value  # now the last one
            return value

    def _values_of(self, model: nn.Module) -> dict[Hashable, T]:
        made = vars(model).get(ATTRIBUTE)
        if not isinstance(made, _Made) or made.model() is not model:  # a shallow copy shares that of its original
            made = vars(model)[ATTRIBUTE] = _Made(model)
        return made.values.setdefault(self, {})
