"""Calls as CUDA graphs: warmed up, captured and replayed, or refused with one sentence.

Attacks (`attacks.Graphs`) and whole training updates (`training.captured`) get their graphs here.
"""

from __future__ import annotations

import random
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Protocol, TypeVar
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor

from sparse_adv.errors import first_cause

T = TypeVar("T")
Stages = Mapping[str, Callable[..., Any]]
"""The parts of a call in order, by name; each takes the inputs of the call, and the last one returns its result."""

_kept: ContextVar[list[object] | None] = ContextVar("kept", default=None)
"""Objects that the graph of the call in progress needs; None outside of such a call."""


class HoldsGraphs(Protocol):
    """An object with graphs that it can capture again."""

    def forget(self) -> None:
        """Delete the graphs."""


holders: WeakSet[HoldsGraphs] = WeakSet()
"""All holders in the process: a capture that fails makes their graphs useless."""

_capturing = threading.RLock()
"""Held during a capture: a process can make only one at a time, because PyTorch synchronises with the GPU before it."""

_ATTEMPTS = 2
"""After this many warm-ups with a waiting host a call is refused. In the first one the engine may check a new model."""


def inside_a_call() -> bool:
    """Whether a call that is captured as a whole is in progress, so that no part of it may be captured on its own."""
    return _kept.get() is not None


def keep(value: object) -> None:
    """During a capture, keep an object, such as reused memory, as long as the graph."""
    kept = _kept.get()
    if kept is not None:
        kept.append(value)


@contextmanager
def part_of_a_call() -> Iterator[list[object]]:
    """A context for code that is captured as a whole, or runs as if it were; yields the objects given to `keep`."""
    kept: list[object] = []
    token = _kept.set(kept)
    try:
        yield kept
    finally:
        _kept.reset(token)


def warn_of_refusal(what: str, reason: str) -> None:
    """Warn that these calls are not captured."""
    warnings.warn(f"{what} run step by step and not as a CUDA graph: {reason}", stacklevel=6)


class Capturer:
    """Runs and captures calls on a CUDA stream of its own.

    A call is captured only after it has run once on that stream, so that libraries have allocated their workspaces:
    `capturer.run(call)`, then `replay = capturer.capture(call)`.
    """

    device: ClassVar[str] = "cuda"

    def __init__(self, device: torch.device | None = None) -> None:
        self.stream = torch.cuda.Stream(device)
        # All graphs share one memory pool: between replays, only a graph's result needs to stay in memory.
        self.pool = torch.cuda.graph_pool_handle()
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    @staticmethod
    def is_capturing() -> bool:
        """Whether the user is capturing a graph on the present stream: then no other capture may begin."""
        # torch without CUDA cannot answer the second question.
        return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()

    def run(self, call: Callable[[], T]) -> T:
        """Run a call on the stream of later captures, after the work that the current stream has queued so far."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = call()
        current.wait_stream(self.stream)
        if isinstance(result, Tensor):
            result.record_stream(current)
        return result

    def warm_up(self, call: Callable[[], T]) -> tuple[T, bool]:
        """Run a call; return its result and whether it synchronised with the GPU, because then no graph can capture it.

        A failed capture would show the same, but PyTorch does not recover completely from one: before 2.12 it could not
        capture any graph afterwards (pytorch pull requests 171265 and 180395).
        """
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                result = self.run(call)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        synchronises = False
        for warning in caught:
            synchronises |= "called a synchronizing CUDA operation" in str(warning.message)
            if "ynchroniz" not in str(warning.message):  # also drops this mode's prototype warning
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        return result, synchronises

    def capture(self, call: Callable[[], T]) -> Callable[[], T]:
        """Capture a call without running it; return a function that replays it and always returns the same result."""
        graph = torch.cuda.CUDAGraph()
        generator = torch.cuda.default_generators[self.stream.device.index]
        state = generator.clone_state()
        if not self._graphs:
            # PyTorch refuses to capture into a pool that holds a live tensor but whose graphs are all gone.
            self.pool = torch.cuda.graph_pool_handle()
        try:
            # The outer context restores the current stream even if the capture cannot be ended. "thread_local" lets
            # other threads, such as those of a DataLoader, allocate memory during the capture. Autograd's thread runs
            # the backward pass on the stream of the forward pass, so it is captured too.
            with (
                _capturing,
                warnings.catch_warnings(),
                torch.cuda.stream(self.stream),
                torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"),
            ):
                # PyTorch warns of a stage that computes nothing, such as the attack of the objective "natural".
                warnings.filterwarnings("ignore", "The CUDA Graph is empty")
                result = call()
        except BaseException:
            # After a failed capture the generator and the memory pool stay in capture state: replace both. Earlier
            # graphs keep the generator's old state, from which torch 2.10 to 2.12 cannot draw in a replay.
            generator.graphsafe_set_state(state)
            self.pool = torch.cuda.graph_pool_handle()
            for holder in list(holders):
                holder.forget()
            raise
        self._graphs.add(graph)

        def replay() -> T:
            graph.replay()
            return result

        return replay


@dataclass(eq=False)
class Call:
    """A call that has run before."""

    keep_alive: object
    """Objects whose id or address is part of the key, so that no other object can get the same one."""
    facts: Any = None
    """Facts that the caller needs again when the call is replayed."""
    inputs: Sequence[Tensor | None] = ()
    """Memory of the inputs that a replay reads."""
    replays: dict[str, Callable[[], Any]] = field(default_factory=dict)
    """Functions that replay each stage; empty before the capture."""
    has_run: bool = False
    attempts: int = 0
    """Number of warm-ups in a row in which the host waited for the GPU."""
    reason: str = ""
    """Why it cannot be captured."""


class CallCache:
    """The most recent calls. Each is captured when it is made for the second time, and replayed from then on.

    The results are those of the call itself, bit for bit, and always new tensors. A replay runs no Python code, and
    reads and writes the same memory as the capture. So the key of a call must hold everything that its code depends on,
    except the values of its inputs, which are copied. What the host must do at every call belongs outside of the call.

    Args:
        capacity: maximum number of calls; beyond it, the least recently used call is forgotten.
        capturer: makes the graphs.
    """

    def __init__(self, capacity: int, capturer: type[Capturer] = Capturer) -> None:
        self.capacity, self._capturer = capacity, capturer
        self.calls: dict[Hashable, Call] = {}
        """The most recently used call is last."""
        self.capturers: dict[torch.device, Capturer] = {}
        holders.add(self)

    def captures_on(self, device: torch.device) -> bool:
        """Whether calls on this device can be captured."""
        return device.type == self._capturer.device

    def find(self, key: Hashable, keep_alive: object) -> Call:
        """Return the call with this key, or make it."""
        call = self.calls.pop(key, None) or Call(keep_alive)
        self.calls[key] = call  # now the last one
        if len(self.calls) > self.capacity:
            del self.calls[next(iter(self.calls))]
        return call

    def clear(self) -> None:
        """Forget all calls and delete their graphs."""
        self.calls.clear()

    def forget(self) -> None:
        """Delete all graphs, but remember which calls cannot be captured."""
        self.calls = {key: call for key, call in self.calls.items() if not call.replays}

    def run(
        self,
        call: Call,
        what: str,
        stages: Stages,
        inputs: Sequence[Tensor | None],
        device: torch.device,
        phase: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext(),
        at_once: bool = False,
    ) -> Any:
        """Make a call, by a replay if possible; the first two times its stages run without a graph.

        Args:
            call: from `find`.
            what: how a warning names such calls if this one cannot be captured.
            stages: its parts, which are captured one by one. A stage may read what earlier stages have made.
            inputs: of each stage. Inputs on the CPU are copied to the device; the host does not wait for the copy.
            device: of the call.
            phase: entered around each stage with its name.
            at_once: whether to capture the call the first time, because it is known to come again.
        """
        if call.replays:
            for memory, value in zip(call.inputs, inputs, strict=True):
                if memory is not None and value is not None:
                    memory.copy_(value.detach(), non_blocking=True)
            result = None
            for name, replay in call.replays.items():
                with phase(name):
                    result = replay()
            return _copied(result)
        inputs = [None if value is None else value.to(device, non_blocking=True) for value in inputs]
        if call.reason:
            return _run_each(stages, inputs, phase, lambda stage: stage())
        capturer = self.capturers.get(device)
        if capturer is None:
            capturer = self.capturers[device] = self._capturer(device)
        has_run, call.has_run = call.has_run, True
        if not (has_run or at_once):
            with part_of_a_call():
                return _run_each(stages, inputs, phase, capturer.run)
        # Warm-up and capture read the same memory: with another alignment, libraries might choose other kernels.
        own = [None if value is None else value.detach().clone() for value in inputs]
        result = self._warm_up(capturer, call, stages, own, phase)
        if not call.reason and not call.attempts:
            self._capture(capturer, call, stages, own)
        if call.reason:
            warn_of_refusal(what, call.reason)
        return _copied(result)  # it may be one of `own`, which the next replay overwrites

    @staticmethod
    def _warm_up(
        capturer: Capturer,
        call: Call,
        stages: Stages,
        inputs: Sequence[Tensor | None],
        phase: Callable[[str], AbstractContextManager[None]],
    ) -> Any:
        """Run the stages; note in the call whether the host waited, or what else cannot be captured."""
        waited = False

        def watched(stage: Callable[[], Any]) -> Any:
            nonlocal waited
            result, waits = capturer.warm_up(stage)
            waited |= waits
            return result

        before = _host_generators(capturer.device)
        with part_of_a_call():
            result = _run_each(stages, inputs, phase, watched)
        call.attempts = call.attempts + 1 if waited else 0
        if call.attempts == _ATTEMPTS:
            call.reason = "it synchronises with the GPU"
        if _host_generators(capturer.device) != before:
            call.reason = "it draws random numbers on the CPU, which a replay would not draw again"
        return result

    @staticmethod
    def _capture(capturer: Capturer, call: Call, stages: Stages, memory: Sequence[Tensor | None]) -> None:
        try:
            with without_cached_casts(), part_of_a_call() as kept:
                replays = {name: capturer.capture(partial(stage, *memory)) for name, stage in stages.items()}
            call.inputs, call.replays, call.keep_alive = memory, replays, (call.keep_alive, kept)
        except Exception as error:  # any error: the same call has just run without one
            call.reason = first_cause(error)


@contextmanager
def without_cached_casts() -> Iterator[None]:
    """A context for a capture, which reads no cast that autocast has cached, and leaves none behind.

    No replay would update a cast that was made before the capture, and one that was made in it has no values before a
    replay.
    """
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()


def _run_each(
    stages: Stages,
    inputs: Sequence[Tensor | None],
    phase: Callable[[str], AbstractContextManager[None]],
    run: Callable[[Callable[[], Any]], Any],
) -> Any:
    result = None
    for name, stage in stages.items():
        with phase(name):
            result = run(partial(stage, *inputs))
    return result


def _copied(result: Any) -> Any:
    """A result in new memory: the next replay overwrites the old."""
    if isinstance(result, Tensor):
        return result.clone()
    return tuple(map(_copied, result)) if isinstance(result, tuple) else result


def _host_generators(device: str) -> tuple[object, ...]:
    """The states of the random generators on the host: of Python, NumPy and, if the device is a GPU, PyTorch."""
    _, words, position, *_ = np.random.get_state()
    states = random.getstate(), np.asarray(words).tobytes(), position
    return states if device == "cpu" else (*states, torch.get_rng_state().numpy().tobytes())
