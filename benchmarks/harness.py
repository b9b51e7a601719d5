"""What every benchmark shares.

Times are seconds of a call in this process, output allocation included: by the wall clock on a CPU, by CUDA events on a
GPU.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
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


def mask_of(shape: Sequence[int], block: Sequence[int], density: float) -> torch.Tensor:
    """A random mask of whole blocks, always the same; edge blocks are smaller."""
    generator = torch.Generator().manual_seed(0)
    sizes = (*block, 1, 1)[:4]
    counts = [-(-length // size) for length, size in zip(shape, sizes, strict=True)]
    mask = torch.rand(counts, generator=generator) < density
    for dim, size in enumerate(sizes):
        mask = mask.repeat_interleave(size, dim).narrow(dim, 0, shape[dim])
    return mask.contiguous()


def interleaved(
    sides: Mapping[str, Callable[[], object]], rounds: int = 9, device: str = "cpu"
) -> dict[str, dict[str, float]]:
    """Time the sides in turns, so that a busy machine slows all of them alike: median, 20 % and 80 % quantile."""
    clock = _by_events if device == "cuda" else _by_wall_clock
    for side in sides.values():
        side()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            seconds[name].append(clock(side))
    return {name: _quantiles(times) for name, times in seconds.items()}


def captured(side: Callable[[], object], calls: int = 20) -> Callable[[], object]:
    """Some calls of a side as one CUDA graph, so that what is timed is the GPU's work and not the launching of it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            side()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            side()
    return graph.replay


def interleaved_graphs(
    sides: Mapping[str, Callable[[], object]], rounds: int = 9, calls: int = 20
) -> dict[str, dict[str, float]]:
    """`interleaved` on a GPU, each side under a CUDA graph of several calls; seconds of one call."""
    times = interleaved({name: captured(side, calls) for name, side in sides.items()}, rounds, "cuda")
    return {name: {key: value / calls for key, value in found.items()} for name, found in times.items()}


def copy_bandwidth(gigabytes: float = 2.0) -> float:
    """Bytes a second, read and written, of the GPU's own copy: the bound of whatever only moves memory."""
    source = torch.empty(int(gigabytes * 2**30) // 4, device="cuda")
    target = torch.empty_like(source)
    median = interleaved({"copy": lambda: target.copy_(source)}, 9, "cuda")["copy"]["median"]
    return 2 * source.numel() * 4 / median


def write_rows(path: Path | None, rows: Sequence[Mapping[str, Any]]) -> None:
    """A JSON line per row, each with the facts that its numbers depend on."""
    if path is None:
        return
    facts = environment()
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps({**row, **facts}) + "\n" for row in rows))
    partial.replace(path)


def _by_wall_clock(side: Callable[[], object]) -> float:
    begin = time.perf_counter()
    side()
    return time.perf_counter() - begin


def _by_events(side: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    side()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def _quantiles(times: list[float]) -> dict[str, float]:
    fifths = statistics.quantiles(times, n=5)
    return {"median": statistics.median(times), "q20": fifths[0], "q80": fifths[3]}


def environment() -> dict[str, Any]:
    """What a number depends on."""
    gpu = {}
    if torch.cuda.is_available():
        gpu = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "ops_on_cuda": ops.cuda_ops()}
    return {
        "date": time.strftime("%Y-%m-%d"),
        **gpu,
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
    command = ["git", "describe", "--always", "--dirty"]
    known = subprocess.run(command, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    return known or os.environ.get("COMMIT", "unknown")
