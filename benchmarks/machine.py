"""The machine that a benchmark runs on: its name and versions, and the rates that plain PyTorch reaches on it."""

from __future__ import annotations

import math
import shutil
import subprocess
import time
from typing import NamedTuple

import torch
from timing import Side, interleaved

from sparse_adv import facts, ops

COPIED_BYTES = {"cpu": 2**24, "cuda": 2**31}  # 16 MiB is the size of 64 images of 64 channels and 32 x 32 pixels


class Peak(NamedTuple):
    """The highest rates of this machine that `measured_peak` reached."""

    flops: float
    """FLOP a second; a multiply-accumulate operation (MAC) is two."""
    bandwidth: float
    """Bytes a second, read plus written."""

    def seconds(self, macs: int, moved: int) -> float:
        """The lower bound of a call's time: the time of its MACs or of its moved bytes, whichever is longer."""
        return max(2 * macs / self.flops, moved / self.bandwidth)


def measured_peak(device: str = "cpu") -> Peak:
    """Measure both rates with the threads that PyTorch uses now; each is the second fastest of 9 calls.

    FLOP/s on a CPU, float32: the faster of two, since BLAS and oneDNN differ by machine. One is `torch.mm` of square
    matrices, three of which fit in the L2 of the threads' cores; the other is a 3x3 convolution of 64 channels at
    34 x 34 pixels without padding, batch 64. FLOP/s on a GPU: `torch.mm` of 8192 x 8192 bfloat16 matrices. Bytes:
    `copy_bandwidth`.
    """
    if device == "cuda":
        a, b = torch.randn(2, 8192, 8192, device=device).bfloat16()
        sides: dict[str, Side] = {"mm": lambda: torch.mm(a, b)}
    else:
        rows = math.isqrt(torch.get_num_threads() * (_l2_bytes() or 2**20) // 12)
        a, b = torch.randn(2, *[max(64, rows // 64 * 64)] * 2)
        x, weight = torch.randn(64, 64, 34, 34).contiguous(memory_format=torch.channels_last), torch.randn(64, 64, 3, 3)
        sides = {"mm": lambda: torch.mm(a, b), "conv2d": lambda: torch.conv2d(x, weight)}
    macs = {"mm": len(a) ** 3, "conv2d": 64 * 32**2 * 64**2 * 9}
    times = interleaved(sides, 9, device)
    return Peak(max(2 * macs[side] / times[side].q20 for side in sides), copy_bandwidth(device))


def copy_bandwidth(device: str) -> float:
    """Bytes a second, read plus written, of PyTorch's own copy: the bound of an op that only moves memory."""
    source = torch.ones(COPIED_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / interleaved({"copy": lambda: target.copy_(source)}, 9, device)["copy"].q20


def environment() -> dict[str, str | int]:
    """The machine and the versions that a measured number depends on."""
    machine, gpu = facts.machine(), {}
    if machine.gpu:
        gpu = {"gpu": machine.gpu, "cuda": str(torch.version.cuda), "ops_on_cuda": str(ops.cuda_ops())}
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


def print_machine(peak: Peak, device: str) -> None:
    """Print `environment` and the peak, a line each."""
    dense = {"cpu": "float32, torch.mm in the L2 or a dense convolution", "cuda": "torch.mm in bfloat16"}[device]
    rates = {
        "peak": f"{peak.flops / 1e9:.0f} GFLOP/s, {dense}",
        "copy": f"{peak.bandwidth / 1e9:.1f} GB/s, read plus written, copy of {COPIED_BYTES[device] >> 20} MiB",
    }
    for name, value in (environment() | rates).items():
        print(f"{name:<16}{value}")


def _l2_bytes() -> int:
    """The size of one core's L2; 0 if the system does not report it."""
    if not shutil.which("getconf"):
        return 0
    size = subprocess.run(["getconf", "LEVEL2_CACHE_SIZE"], capture_output=True, text=True).stdout.strip()
    return int(size) if size.isdecimal() else 0
