"""What the engine has made of models, kept for the states in which each model was used last."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

T = TypeVar("T")


class StateCache(Generic[T]):
    """Values by model and state; what belongs to a model is freed with it.

    Args:
        capacity: values that are kept of each model; beyond it the one that was used least recently is forgotten.

    Examples:
        >>> cache, model = StateCache(capacity=4), nn.ReLU()
        >>> cache.find(model, "eval", lambda: 1), cache.find(model, "eval", lambda: 2)
        (1, 1)
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._values: WeakKeyDictionary[nn.Module, dict[Hashable, T]] = WeakKeyDictionary()
        self._lock = threading.RLock()  # of one thread's own: a model's code may run another model

    def find(self, model: nn.Module, state: Hashable, make: Callable[[], T]) -> T:
        """Return the value for this state of the model, made now if there is none; other threads wait for it."""
        with self._lock:
            values = self._values.setdefault(model, {})
            value = values.pop(state) if state in values else make()
            values[state] = value  # now the last one
            while len(values) > self.capacity:
                del values[next(iter(values))]
        return value
