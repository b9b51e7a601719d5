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

    It is an attribute of the model, so both are freed together, although values refer to modules, whose hooks may refer
    to the model. Copies and pickles of the model have an empty dictionary in its place.
    """

    __slots__ = ("model", "values")

    def __init__(self, model: nn.Module) -> None:
        self.model = weakref.ref(model)
        self.values: dict[StateCache[Any], dict[Hashable, Any]] = {}

    def __reduce__(self) -> tuple[type[dict[Any, Any]], tuple[()]]:
        return dict, ()


class StateCache(Generic[T]):
    """Values by model and state; the values of a model are freed with it.

    Args:
        capacity: number of values kept for each model; beyond it, the least recently used value is forgotten.

    Examples:
        >>> cache, model = StateCache(capacity=4), nn.ReLU()
        >>> cache.find(model, lambda: "eval", lambda: 1), cache.find(model, lambda: "eval", lambda: 2)
        (1, 1)
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._making = threading.RLock()
        """Held while a value is made. The same thread may take it again: the code of a model may run another model."""
        self._access = threading.Lock()
        """Held while the dictionaries are read and changed, and never while anything else runs."""

    def find(self, model: nn.Module, state: Callable[[], Hashable], make: Callable[[], T]) -> T:
        """Return the value for the present state of the model; make it if there is none.

        Meanwhile `find` waits in other threads, but `get` does not. The state is read again after the value is made,
        because only then it may be known what the value depends on.
        """
        with self._making:
            now = state()
            with self._access:
                is_known = now in self._values_of(model)
            if is_known:
                return self.get(model, now)  # type: ignore[return-value]  # None may be the value
            value, now = make(), state()
            with self._access:
                values = self._values_of(model)
                values[now] = value
                while len(values) > self.capacity:
                    del values[next(iter(values))]
        return value

    def get(self, model: nn.Module, state: Hashable) -> T | None:
        """Return the value for a state of the model, or None if there is none."""
        with self._access:
            values = self._values_of(model)
            if state not in values:
                return None
            value = values[state] = values.pop(state)  # now the last one
            return value

    def _values_of(self, model: nn.Module) -> dict[Hashable, T]:
        made = vars(model).get(ATTRIBUTE)
        if not isinstance(made, _Made) or made.model() is not model:  # a shallow copy of a model shares its original's
            made = vars(model)[ATTRIBUTE] = _Made(model)
        return made.values.setdefault(self, {})
