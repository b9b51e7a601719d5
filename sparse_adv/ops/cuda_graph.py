"""Warm-up and capture of CUDA graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Capturer:
    """Runs and captures calls on a CUDA stream of its own.

    A call is captured after it has run once on that stream, so that libraries have allocated their workspaces for it:
    `capturer.run(call)`, then `replay = capturer.capture(call)`.
    """

    device: ClassVar[str] = "cuda"

    def __init__(self, device: torch.device | None = None) -> None:
        self.stream = torch.cuda.Stream(device)
        # All graphs share one memory pool: between replays only a graph's result must stay in memory.
        self.pool = torch.cuda.graph_pool_handle()

    def run(self, call: Callable[[], T]) -> T:
        """Run a call on the stream of later captures, after the work queued on the current stream so far."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = call()
        current.wait_stream(self.stream)
        if isinstance(result, Tensor):
            result.record_stream(current)
        return result

    def warm_up(self, call: Callable[[], T]) -> tuple[T, bool]:
        """Run a call, and return its result and whether it synchronised with the GPU, which no graph can capture.

        A failed capture would show the same, but PyTorch does not recover from it completely: before 2.12 it could not
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
            if "ynchroniz" not in str(warning.message):  # excludes also the warning that the debug mode is a prototype
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        return result, synchronises

    def capture(self, call: Callable[[], T]) -> Callable[[], T]:
        """Capture a call without running it; return a function that replays it and always returns the same result."""
        graph = torch.cuda.CUDAGraph()
        generator = torch.cuda.default_generators[self.stream.device.index]
        state = generator.clone_state()
        try:
            # The outer context restores the current stream even if the capture cannot be ended. "thread_local" lets
            # other threads, such as those of a DataLoader, allocate memory during the capture.
            with (
                torch.cuda.stream(self.stream),
                torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"),
            ):
                result = call()
        except BaseException:
            # After a failed capture the generator and the memory pool stay in capture state: replace both.
            generator.graphsafe_set_state(state)
            self.pool = torch.cuda.graph_pool_handle()
            raise

        def replay() -> T:
            graph.replay()
            return result

        return replay
