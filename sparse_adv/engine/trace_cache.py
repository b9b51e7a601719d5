"""What is made of models by tracing them, kept for as long as the traces are right."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sparse_adv.engine.comparison import Undecided
from sparse_adv.engine.model_state import structure_of
from sparse_adv.engine.reads import Contents, changed_attribute, contents_of
from sparse_adv.engine.state_cache import StateCache
from sparse_adv.errors import first_line

log = logging.getLogger(__name__)

T = TypeVar("T")

_PATIENCE = 4
"""Changes of a model in succession after each of which it is traced again."""
_CALLS_OF_A_TRACE = (16, 64, 256)
"""Calls between the first two traces for the same input, the next two, and all later ones. A trace took
12 times as long as the FGSM attack that needed it (ResNet-18 of width 16, 16 images, a CPU)."""
_MOST_INPUTS = 1024
"""Kinds of input whose calls are counted for each model."""


@dataclass
class _Demand:
    """How often a model is called with one kind of input."""

    traces: int = 0
    calls: int = 0
    """Since the last trace."""

    @property
    def is_too_rare(self) -> bool:
        """Whether what was made and forgotten would be forgotten again before it has saved the time of a trace."""
        return self.traces > 0 and self.calls < _CALLS_OF_A_TRACE[min(self.traces, len(_CALLS_OF_A_TRACE)) - 1]


@dataclass
class _History:
    """How the state of a model has changed from call to call."""

    structure: Hashable = None
    contents: Contents = ()
    changes: int = 0
    """Since a call last found what was made before."""
    unchanged: int = 0
    """Calls since the last change."""
    reason: str = ""
    """What changes, once that has been said."""
    demand: dict[Hashable, _Demand] = field(default_factory=dict)
    """By the kind of input, since the last change."""
    told_of_inputs: bool = False
    """Whether it was said that the inputs are of too many kinds."""

    def add(self, structure: Hashable, contents: Contents) -> None:
        """Note the state in a call."""
        changed = self.structure is not None and (structure, contents) != (self.structure, self.contents)
        self.structure, self.contents = structure, contents
        self.unchanged = 0 if changed else self.unchanged + 1
        if changed or len(self.demand) > _MOST_INPUTS:
            self.demand.clear()
        self.changes += changed

    @property
    def is_restless(self) -> bool:
        """Whether a trace is likely to be wrong before it is used again."""
        return self.unchanged < self.changes - _PATIENCE


def state_of(model: nn.Module, x: Tensor, shape: Hashable) -> tuple[Hashable, Hashable, Contents]:
    """The call, of whose input the dtype, the device and `shape` count, and the model's modules and attributes."""
    device = x.device.type
    call = shape, x.dtype, x.device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return call, structure_of(model), contents_of(model)


class TraceCache(Generic[T]):
    """What was made of models by tracing them in the states in which each was used last.

    A model's state is its modules, modes and tensors, and the attributes that traced code has read. If it changes at
    every call, nothing is traced until it stays the same for some calls; with every change that number grows. The same
    holds for what was forgotten in favour of other inputs.

    Args:
        capacity: as of `StateCache`.
    """

    def __init__(self, capacity: int) -> None:
        self._made: StateCache[T] = StateCache(capacity)
        self._histories: WeakKeyDictionary[nn.Module, _History] = WeakKeyDictionary()

    def find(self, model: nn.Module, x: Tensor, shape: Hashable, make: Callable[[], T]) -> T | str:
        """Return what `make` returns, or returned before, for a model in this state; or why nothing is made.

        Args:
            model: any module.
            x: its input, of which dtype and device count.
            shape: what of the input's shape counts.
            make: traces the model; a torch.OutOfMemoryError and an Undecided leave nothing behind.
        """
        history = self._histories.setdefault(model, _History())
        call, structure, contents = state_of(model, x, shape)
        before = history.contents
        history.add(structure, contents)
        made = self._made.get(model, (call, structure, contents))
        demand = history.demand.setdefault(call, _Demand())
        demand.calls += 1
        if made is not None:
            history.changes = 0
            return made
        if history.is_restless:
            if not history.reason:
                what = changed_attribute(model, before, contents) or "what its modules are"
                history.reason = f"{what} changes from call to call"
                log.warning("the engine leaves this %s to autograd: %s", type(model).__name__, history.reason)
            return history.reason
        if demand.is_too_rare:
            reason = f"its inputs are of more than {self._made.capacity} shapes in turn"
            if not history.told_of_inputs:
                log.warning("the engine leaves some calls of this %s to autograd: %s", type(model).__name__, reason)
            history.told_of_inputs = True
            return reason
        try:
            made = self._made.find(model, lambda: state_of(model, x, shape), make)
        except (torch.OutOfMemoryError, Undecided) as error:  # say nothing about the model: the next call tries again
            is_full = isinstance(error, torch.OutOfMemoryError)
            reason = f"memory did not suffice to try it out: {first_line(error)}" if is_full else str(error)
            log.warning("the engine leaves this call of a %s to autograd: %s", type(model).__name__, reason)
            return reason
        history.structure, history.contents = structure_of(model), contents_of(model)
        demand.traces, demand.calls = demand.traces + 1, 0
        return made
