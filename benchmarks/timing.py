"""Timing: several sides in turns in one process, by the wall clock on a CPU and by CUDA events on a GPU.

A time is the seconds of one call, including the allocation of its output.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from sparse_adv.ops.cuda_graph import Capturer

Side = Callable[[], object]
"""A call without arguments that is timed."""


class Times(NamedTuple):
    """Quantiles of the times of one side, in seconds."""

    median: float
    q20: float
    q80: float

    @property
    def spread(self) -> float:
        """The distance from the 20 % to the 80 % quantile, as a share of the median."""
        return (self.q80 - self.q20) / self.median


def interleaved(sides: Mapping[str, Side], rounds: int = 9, device: str = "cpu") -> dict[str, Times]:
    """Time the sides in turns after one warm-up call of each, so that a busy machine slows all of them alike."""
    clock = _by_events if device == "cuda" else _by_wall_clock
    for side in sides.values():
        side()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            seconds[name].append(clock(side))
    return {name: _quantiles(values) for name, values in seconds.items()}


def interleaved_graphs(sides: Mapping[str, Side], rounds: int = 9, calls: int = 20) -> dict[str, Times]:
    """`interleaved` on a GPU, each side as a CUDA graph of several calls; the times are those of one call."""
    times = interleaved({name: captured(side, calls) for name, side in sides.items()}, rounds, "cuda")
    return {name: Times(*(seconds / calls for seconds in quantiles)) for name, quantiles in times.items()}


def captured(side: Side, calls: int = 20) -> Side:
    """Several calls of a side as one CUDA graph: its replay times the GPU's work without the launches by Python.

    A replay returns what the last call returned in the capture, and overwrites that memory.
    """
    capturer = Capturer()
    for _ in range(3):
        capturer.run(side)

    def repeat() -> object:
        for _ in range(calls - 1):
            side()
        return side()

    replay = capturer.capture(repeat)

    def replayed(kept: Side = side) -> object:
        """Keeps the side alive, because the graph reads its tensors."""
        return replay()

    return replayed


def _by_wall_clock(side: Side) -> float:
    begin = time.perf_counter()
    side()
    return time.perf_counter() - begin


def _by_events(side: Side) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    side()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def _quantiles(seconds: list[float]) -> Times:
    fifths = statistics.quantiles(seconds, n=5) if len(seconds) > 1 else 4 * seconds
    return Times(statistics.median(seconds), fifths[0], fifths[3])
