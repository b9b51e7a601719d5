"""What every benchmark shares.

Times are seconds of a call in this process, output allocation included: by the wall clock on a CPU, by CUDA events on a
GPU.
"""

from __future__ import annotations

import ctypes
import json
import math
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sparse_adv import facts, ops
from sparse_adv.ops.cuda_graph import Capturer
from sparse_adv.ops.masked_conv2d_mask import expand_blocks

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
COPIED_BYTES = {"cpu": 2**24, "cuda": 2**31}  # 16 MiB are the images of 64@32 at batch 64


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
    return expand_blocks(torch.rand(counts, generator=generator) < density, sizes, shape)


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
    capturer = Capturer()
    for _ in range(3):
        capturer.run(side)

    def repeat() -> None:
        for _ in range(calls):
            side()

    return capturer.capture(repeat)


def interleaved_graphs(
    sides: Mapping[str, Callable[[], object]], rounds: int = 9, calls: int = 20
) -> dict[str, dict[str, float]]:
    """`interleaved` on a GPU, each side under a CUDA graph of several calls; seconds of one call."""
    times = interleaved({name: captured(side, calls) for name, side in sides.items()}, rounds, "cuda")
    return {name: {key: value / calls for key, value in found.items()} for name, found in times.items()}


class Peak(NamedTuple):
    """The highest rates of this machine that plain PyTorch reaches in this process: `measured_peak`."""

    flops: float  # a second; a multiply-add is two
    bandwidth: float  # bytes a second, those read and those written

    def seconds(self, multiply_adds: int, moved: int) -> float:
        """The bound of a call: its multiply-adds, or the bytes that it moves, whichever takes longer."""
        return max(2 * multiply_adds / self.flops, moved / self.bandwidth)


def measured_peak(device: str = "cpu") -> Peak:
    """Measure both rates, of each the second fastest of 9 calls, with the threads that PyTorch has now.

    FLOP/s on a CPU, float32: `torch.mm` of square matrices, three of which fit the L2 of the threads' cores, or a 3x3
    convolution of 64 channels at 34 x 34 without padding, batch 64, whichever is faster: BLAS and oneDNN differ by
    machine. On a GPU: `torch.mm` of 8192 x 8192 bfloat16 matrices. Bytes: `copy_bandwidth`.
    """
    if device == "cuda":
        a, b = torch.randn(2, 8192, 8192, device=device).bfloat16()
        sides: dict[str, Callable[[], object]] = {"mm": lambda: torch.mm(a, b)}
    else:
        rows = math.isqrt(torch.get_num_threads() * (_l2_bytes() or 2**20) // 12)
        a, b = torch.randn(2, *[max(64, rows // 64 * 64)] * 2)
        x, weight = torch.randn(64, 64, 34, 34).contiguous(memory_format=torch.channels_last), torch.randn(64, 64, 3, 3)
        sides = {"mm": lambda: torch.mm(a, b), "conv2d": lambda: torch.conv2d(x, weight)}
    multiply_adds = {"mm": len(a) ** 3, "conv2d": 64 * 32**2 * 64**2 * 9}
    times = interleaved(sides, 9, device)
    return Peak(max(2 * multiply_adds[side] / times[side]["q20"] for side in sides), copy_bandwidth(device))


def copy_bandwidth(device: str) -> float:
    """Bytes a second, read and written, of PyTorch's own copy: the bound of whatever only moves memory."""
    source = torch.ones(COPIED_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / interleaved({"copy": lambda: target.copy_(source)}, 9, device)["copy"]["q20"]


def convolution_work(
    mask: torch.Tensor, shape: Sequence[int], stride: int = 1, padding: int = 1, element_bytes: int = 4
) -> tuple[int, int]:
    """The least multiply-adds and bytes of a masked convolution on input of `shape`, the same in each of its passes.

    Taps that fall on padding do not count; input, output and kept weights, or their gradients, move once.
    """
    ones = torch.ones(1, *shape[1:])
    products = torch.conv2d(ones, mask.cpu().float(), None, stride, padding)
    moved = shape[0] * (ones.numel() + products.numel()) + int(mask.count_nonzero())
    return shape[0] * int(products.sum(dtype=torch.float64)), element_bytes * moved


def print_machine(peak: Peak) -> None:
    """What the numbers of a CPU benchmark depend on, a line each."""
    rates = {
        "peak": f"{peak.flops / 1e9:.0f} GFLOP/s, torch.mm in the L2 or a dense convolution, whichever is faster",
        "copy": f"{peak.bandwidth / 1e9:.1f} GB/s, read and written, copy of {COPIED_BYTES['cpu'] >> 20} MiB",
    }
    for name, value in (environment() | rates).items():
        print(f"{name:<16}{value}")


def write_rows(path: Path | None, rows: Sequence[Mapping[str, Any]]) -> None:
    """A JSON line per row, each with the facts that its numbers depend on."""
    if path is None:
        return
    conditions = environment()
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps({**row, **conditions}) + "\n" for row in rows))
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
    machine, gpu = facts.machine(), {}
    if machine.gpu:
        gpu = {"gpu": machine.gpu, "cuda": torch.version.cuda, "ops_on_cuda": ops.cuda_ops()}
    return {
        "date": time.strftime("%Y-%m-%d"),
        **gpu,
        "device": machine.cpu,
        "cores": machine.cores,
        "l2_bytes": _l2_bytes(),
        "instruction_set": machine.instruction_set,
        "threads": machine.threads,
        "torch": torch.__version__,
        "commit": facts.commit() or "unknown",
    }


def _l2_bytes() -> int:
    """Of one core; 0 where it is not known."""
    size = _output_of("getconf", "LEVEL2_CACHE_SIZE")
    return int(size) if size.isdecimal() else 0


def _output_of(*command: str) -> str:
    """What a command prints, nothing where there is no such command."""
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() if shutil.which(command[0]) else ""
