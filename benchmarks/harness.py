"""What every benchmark shares. Times are wall-clock seconds of a call in this process, output allocation included."""

from __future__ import annotations

import ctypes
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from sparse_adv import ops

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Let glibc keep freed memory instead of returning it to the kernel.

    Otherwise every large output is fresh memory, page faults cost all sides up to 5 ms per 16 MB, and whether they do
    depends on what ran before: ratios jump between two values from process to process.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def interleaved(sides: Mapping[str, Callable[[], object]], rounds: int = 9) -> dict[str, dict[str, float]]:
    """Time the sides in turns, so that a busy machine slows all of them alike: median, 20 % and 80 % quantile."""
    for side in sides.values():
        side()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            begin = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - begin)
    return {name: _quantiles(times) for name, times in seconds.items()}


def _quantiles(times: list[float]) -> dict[str, float]:
    fifths = statistics.quantiles(times, n=5)
    return {"median": statistics.median(times), "q20": fifths[0], "q80": fifths[3]}


def environment() -> dict[str, Any]:
    """What a number depends on."""
    return {
        "device": _cpu_name(),
        "instruction_set": ops.cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": _commit(),
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            facts = dict(line.split(":", 1) for line in lines if ":" in line)
    except OSError:
        return platform.processor()
    fields = {key.strip(): value.strip() for key, value in facts.items()}
    name = fields.get("model name", platform.processor())
    return f"{name} (family {fields.get('cpu family')}, model {fields.get('model')})"


def _commit() -> str:
    answer = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    return answer.stdout.strip() or "unknown"
