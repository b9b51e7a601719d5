"""Tracing with torch.fx in a process with several threads."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any

from torch import fx, nn

lock = threading.RLock()
"""Held by the thread that traces: two threads that replace methods of nn.Module at once would not restore them."""


class Tracer(fx.Tracer):
    """Records the calls of the thread that traces; other threads may run models meanwhile.

    The graph has one input, the model's first argument; all others keep their defaults.

    torch.fx replaces `nn.Module.__call__` and `__getattr__` in the whole process while it traces.

    Attributes:
        part: the module being traced, None for the model itself; after an error, the module that raised it.
        place: its name, for error messages.
    """

    part: nn.Module | None = None
    place = "the model"
    _thread = 0

    def trace(self, root: nn.Module | Callable[..., Any], concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Trace a model; waits while another thread traces."""
        with lock:
            self._thread = threading.get_ident()
            return super().trace(root, concrete_args)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """The arguments of the call that is traced; Python adds the defaults, or says which argument is missing."""
        model = [self.root] if is_module else []
        first = list(inspect.signature(root_fn).parameters.values())[len(model)]
        if first.kind is first.VAR_POSITIONAL:  # the code of DataParallel depends on the number of arguments
            raise ValueError(f"it takes any number of inputs, *{first.name}")
        return root_fn, [*model, self.create_proxy("placeholder", first.name, (), {})]

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Trace the call of a module, or run it for another thread."""
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        outer = self.part, self.place
        self.part, self.place = m, f"module {self.path_of_module(m)!r} ({type(m).__name__})"
        result = self.trace_module(m, forward, args, kwargs)
        self.part, self.place = outer
        return result

    def trace_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Trace the call of a module."""
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """A module's attribute, or a proxy for a parameter where the trace records parameters."""
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)
