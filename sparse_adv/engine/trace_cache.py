"""What is made of models by tracing them, kept as long as the traces are right."""

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
"""After each of this many successive changes a model is traced again at once, later only after some equal calls."""
_CALLS_OF_A_TRACE = (16, 64, 256)
"""Least number of calls between the first and second trace for the same kind of input, the second and third, and all
later ones. A trace took 12 times as long as the FGSM attack that needed it (ResNet-18 of width 16, 16 images, a
CPU)."""
_MOST_INPUTS = 1024
"""Number of kinds of input whose calls are counted for each model."""


@dataclass
class _Demand:
    """How often a model is called with one kind of input."""

    traces: int = 0
    calls: int = 0
    """Since the last trace."""

    @property
    def is_too_rare(self) -> bool:
        """Whether calls with this input are so rare that a new trace would be forgotten before it pays."""
        return self.traces > 0 and self.calls < _CALLS_OF_A_TRACE[min(self.traces, len(_CALLS_OF_A_TRACE)) - 1]


@dataclass
class _History:
    """How the state of a model has changed from call to call."""

    structure: Hashable = None
    contents: Contents = ()
    changes: int = 0
    """Number of changes since a call last found a cached result."""
    unchanged: int = 0
    """Number of calls since the last change."""
    reason: str = ""
    """What changes; set once a warning has named it."""
    demand: dict[Hashable, _Demand] = field(default_factory=dict)
    """Calls by the kind of input, since the last change."""
    warned_of_inputs: bool = False
    """Whether a warning has said that the inputs are of too many kinds."""

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
    """The key of a trace: `shape`, dtype and device of the input, autocast, and the model's modules and attributes."""
    device = x.device.type
    call = shape, x.dtype, x.device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return call, structure_of(model), contents_of(model)


class TraceCache(Generic[T]):
    """What tracing has made of models, for the states in which each model was used last.

    A model's state is its modules, modes and tensors, and the attributes that traced code has read. If it changes at
    every call, nothing is traced until it has stayed the same for some calls; this number grows with every change. A
    result that was forgotten in favour of other inputs is also made again only after some calls.

    Args:
        capacity: as for `StateCache`.
    """

    def __init__(self, capacity: int) -> None:
        self._made: StateCache[T] = StateCache(capacity)
        self._histories: WeakKeyDictionary[nn.Module, _History] = WeakKeyDictionary()

    def find(self, model: nn.Module, x: Tensor, shape: Hashable, make: Callable[[], T]) -> T | str:
        """Return what `make` returns, or returned before, for a model in this state; or why nothing is made.

        Args:
            model: any module.
            x: its input; only dtype and device are read.
            shape: the part of the input's shape that the result depends on.
            make: traces the model. After a torch.OutOfMemoryError or Undecided, nothing is kept.
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
            if not history.warned_of_inputs:
                log.warning("the engine leaves some calls of this %s to autograd: %s", type(model).__name__, reason)
            history.warned_of_inputs = True
            return reason
        try:
            made = self._made.find(model, lambda: state_of(model, x, shape), make)
        except (torch.OutOfMemoryError, Undecided) as error:  # no verdict on the model: the next call tries again
            is_full = isinstance(error, torch.OutOfMemoryError)
            reason = f"memory did not suffice to try it out: {first_line(error)}" if is_full else str(error)
            log.warning("the engine leaves this call of a %s to autograd: %s", type(model).__name__, reason)
            return reason
        history.structure, history.contents = structure_of(model), contents_of(model)
        demand.traces, demand.calls = demand.traces + 1, 0
        return made
