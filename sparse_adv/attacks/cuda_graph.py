"""Attacks as CUDA graphs: the whole loop of steps is recorded once and then costs one launch.

Eagerly, each of the few hundred kernels of a step waits for Python to start it. A graph repeats the recorded kernels on
the recorded addresses. So it reads the weights of the moment (masking, casting and packing them is part of it), but its
batch lies in buffers of its own, and no Python runs: what a model's code decides, it decides while it is recorded.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparse_adv.attacks.checks import Labels, check_labels
from sparse_adv.attacks.loop import Search
from sparse_adv.nn import MaskedConv2d
from sparse_adv.nn.masked_layer import MaskedLayer

Work = Callable[[], Tensor]


class Recorder:
    """The part that needs a GPU: runs work, or records it without running it."""

    device: ClassVar[str] = "cuda"

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        # One pool for all graphs: of one that is not being replayed only the result's memory matters.
        self.pool = torch.cuda.graph_pool_handle()

    def run(self, work: Work) -> Tensor:
        """Run work on the stream that records later, so that whatever libraries prepare for a stream is there."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = work()
        current.wait_stream(self.stream)
        result.record_stream(current)
        return result

    def rehearse(self, work: Work) -> tuple[Tensor, bool]:
        """Run work, and tell whether it made the host wait for the GPU, which no graph can record.

        Trying would tell too, but PyTorch does not recover altogether from a recording that fails: before 2.12 it could
        make no graph afterwards (pytorch pull requests 171265 and 180395).
        """
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                result = self.run(work)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        waits = False
        for warning in caught:
            waits |= "called a synchronizing CUDA operation" in str(warning.message)
            if "ynchroniz" not in str(warning.message):  # nor that the debug mode is a prototype
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        return result, waits

    def record(self, work: Work) -> Work:
        """Record work; returns what repeats it, into always the same tensor."""
        graph = torch.cuda.CUDAGraph()
        generator = torch.cuda.default_generators[self.stream.device.index]
        state = generator.clone_state()
        try:
            # The outer context gives the stream back even where the inner one cannot end. Other threads, such as those
            # that load data, may go on allocating.
            with (
                torch.cuda.stream(self.stream),
                torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"),
            ):
                result = work()
        except BaseException:
            # Both would wait for ever for the recording's end.
            generator.graphsafe_set_state(state)
            self.pool = torch.cuda.graph_pool_handle()
            raise

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


@dataclass
class _Entry:
    """An attack that has come before."""

    held: object
    """Whatever the signature knows by its identity or address, which nothing else may get meanwhile."""
    classes: int | None
    buffers: Sequence[Any] = ()
    replay: Work | None = None
    eager: bool = False
    """It can be no graph."""


class Graphs:
    """Attacks recorded as CUDA graphs: pass one to every call of an attack, `pgd(..., graphs=graphs)`.

    An attack counts as the same if its settings, the batch's shape and layout, the model's modules, the addresses of
    its weights, its masks, and what autocast and the backends are told are the same. It runs eagerly twice, is recorded
    the second time and repeated from the third time on, with the same results, bit for bit. What cannot be recorded
    (a model that reads a number back from the GPU) goes on eagerly, and a warning says so. On anything but CUDA all
    attacks run eagerly.

    Forward hooks and other Python code of a model run only when it is recorded. A graph keeps the memory of one
    attack's activations beside PyTorch's own cache; calls must come from one CUDA stream.

    Args:
        capacity: how many graphs are kept; the one that was used least recently goes first.
    """

    recorder: ClassVar[type[Any]] = Recorder

    def __init__(self, capacity: int = 8) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self.capacity = capacity
        self._entries: dict[Hashable, _Entry] = {}
        self._recorders: dict[torch.device, Any] = {}

    def __repr__(self) -> str:
        return f"Graphs(capacity={self.capacity})"

    def __reduce__(self) -> tuple[type[Graphs], tuple[int]]:
        return type(self), (self.capacity,)  # a copy records its own

    def run(self, search: Search, x: Tensor, y: Any, words: Tensor | None, labels: Labels = None) -> Tensor:
        """What `search.run` does, as a graph where that is possible; the result is the caller's own tensor."""
        if not self._recordable(search, x, y):
            return search.run(x, y, words, labels)
        held, signature = _signature(search, x, y, labels)
        recorder = self._recorders.get(x.device) or self._recorders.setdefault(x.device, self.recorder(x.device))
        work = partial(search.run, x, y, words, labels)
        entry = self._entries.get(signature)
        if entry is None:
            result = recorder.run(work)
            entry = _Entry(held, search.classes)
        elif entry.eager:
            result = work()
        elif entry.replay is None:
            result, waits = recorder.rehearse(work)
            self._record(recorder, entry, search, (x, y, words), waits)
        else:
            if entry.classes is not None:
                check_labels(labels, entry.classes)
            for buffer, value in zip(entry.buffers, (x, y, words), strict=True):
                if buffer is not None:
                    buffer.copy_(value.detach(), non_blocking=True)
            result = entry.replay().clone()
        self._entries.pop(signature, None)
        self._entries[signature] = entry  # the last used last
        if len(self._entries) > self.capacity:
            del self._entries[next(iter(self._entries))]
        return result

    def _recordable(self, search: Search, x: Tensor, y: Any) -> bool:
        if x.device.type != self.recorder.device:
            return False
        if not (y is None or (isinstance(y, Tensor) and y.device == x.device)):
            return False
        # Weights held constant by the caller lie where no later call finds them.
        return not any(isinstance(layer, MaskedLayer) and layer.is_frozen for layer in search.model.modules())

    def _record(
        self, recorder: Any, entry: _Entry, search: Search, batch: Sequence[Tensor | None], waits: bool
    ) -> None:
        try:
            if waits:
                raise RuntimeError("it makes the host wait for the GPU")
            x, y, words = entry.buffers = [None if tensor is None else tensor.detach().clone() for tensor in batch]
            # Autocast keeps casts of weights: those of before, the graph would read and never make again; and those of
            # the graph hold no values until it is repeated.
            torch.clear_autocast_cache()
            try:
                entry.replay = recorder.record(partial(search.run, x, y, words))
            finally:
                torch.clear_autocast_cache()
        except RuntimeError as error:
            entry.eager, entry.buffers = True, ()
            warnings.warn(
                f"attacks on this {type(search.model).__name__} run step by step and not as a CUDA graph: "
                f"{_first_cause(error)}",
                stacklevel=5,
            )


def _first_cause(error: BaseException) -> str:
    """The first line of what went wrong first: ending a recording that failed fails as well."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error) or type(error).__name__).splitlines()[0]


def _signature(search: Search, x: Tensor, y: Tensor | None, labels: Labels) -> tuple[object, Hashable]:
    """All that a recording depends on; first what must live on as long as the second is to mean the same."""
    model, device = search.model, x.device.type
    loss, targeted = search.objective
    modules = list(model.modules())
    masks = [module.weight_mask for module in modules if isinstance(module, MaskedLayer)]
    patterns = [module.pattern for module in modules if isinstance(module, MaskedConv2d)]
    signature = (
        (search.start, search.ball, search.alpha, search.steps, search.restarts, search.mode),
        (loss if isinstance(loss, str) else id(loss), targeted, labels is None),
        [None if tensor is None else (tensor.device, tensor.dtype, tensor.shape, tensor.stride()) for tensor in (x, y)],
        [(id(module), getattr(module, "track_running_stats", None)) for module in modules],
        [(tensor.data_ptr(), tensor.dtype, tensor.stride()) for tensor in (*model.parameters(), *model.buffers())],
        [-1 if mask.is_inference() else mask._version for mask in masks],
        [id(pattern) for pattern in patterns],
        (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)),
        torch.are_deterministic_algorithms_enabled(),
        (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        (torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision),  # type: ignore
    )
    hashable = tuple(tuple(part) if isinstance(part, list) else part for part in signature)
    return (search, modules, masks, patterns), hashable
